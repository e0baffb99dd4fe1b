"""What a run will take: memory of each process, time, communication; the best way to lay it out on a cluster."""
