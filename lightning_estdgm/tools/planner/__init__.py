"""``estdgm plan``: what each GPU would hold and send; calculated, not measured."""
