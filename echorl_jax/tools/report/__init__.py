"""The HTML report of a run, and studies of entropy, clips and step deletion.

The modules read the files of a working directory. Only ``policy.py`` runs a model, for the two
studies that need one: golden entropy and step deletion.
"""
