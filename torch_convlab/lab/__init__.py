"""The lab: what the command line (``python -m torch_convlab``) does. Needs the packages of the extra ``[lab]``."""
