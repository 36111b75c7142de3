"""Tools that a training run does not need: the report with its studies, and the plan."""
