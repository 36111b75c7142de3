"""Looks at runs: the HTML report, and studies of entropy, clips and step deletion.

Everything here reads the files of a working directory or small arrays and draws no conclusions of
its own. Only ``policy.py`` runs a model, for the studies that ask one: golden entropy and step
deletion.
"""
