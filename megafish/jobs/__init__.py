"""Runs as jobs: started here, by DeepSpeed's launcher or by Slurm; watched, read and stopped wherever they run."""
