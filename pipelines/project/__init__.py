"""`switchkd new`: a project folder for a pair of models, with configurations, the commands in order, and Slurm files."""
