"""The command `python -m torch_tqattn doctor`."""
