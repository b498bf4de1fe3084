"""Everything a run writes: metrics, rollouts, configuration, report; and progress while it runs. No torch, no Ray."""
