"""Everything a run leaves behind: metrics, rollouts, configuration, report; progress while it runs. No torch, no Ray."""
