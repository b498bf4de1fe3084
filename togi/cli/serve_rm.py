"""``togi serve-rm`` under its established name: ``python -m togi.cli.serve_rm``."""

from togi.cli.main import launch

if __name__ == "__main__":
    launch("serve-rm")
