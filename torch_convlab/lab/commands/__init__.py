"""One module per verb of ``python -m torch_convlab``; see `torch_convlab.lab.command`."""
