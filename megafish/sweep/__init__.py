"""Many runs from one file: expanded, started where they are to run, ranked and drawn."""
