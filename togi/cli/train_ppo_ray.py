"""``togi rl`` under its established name: ``python -m togi.cli.train_ppo_ray``."""

from togi.cli.main import launch

if __name__ == "__main__":
    launch("rl")
