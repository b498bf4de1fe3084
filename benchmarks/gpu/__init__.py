"""The parts of ``gpu_check.py``: what only a GPU can show. One function a part; Togi is imported inside of them."""
