"""What bench_serve.py is made of: servers, clients and engines in processes of their own, and what is asked of them."""
