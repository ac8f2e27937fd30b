"""The study behind the defaults: methods side by side on small real tasks. Tasks, runs, plans and results."""
