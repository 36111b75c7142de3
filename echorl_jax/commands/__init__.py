"""One thin module per command: ``add_arguments(parser)`` and ``run(arguments) -> exit code``.

Nothing heavy is imported before ``run``, so that ``--help`` answers at once.
"""
