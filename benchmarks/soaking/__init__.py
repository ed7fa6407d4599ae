"""What benchmarks/soak.py is made of: the load, the processes that bear it, and what is checked."""
