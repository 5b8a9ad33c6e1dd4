"""What reinforcement and preference learning adds: rewards, rollouts, selection."""
