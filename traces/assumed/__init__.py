"""Routing that is assumed where none was recorded: made for any number of layers and experts and any top-k.

`families` holds how local routing is at three settings, fitted by `fit` to recordings; `routing` makes it for a
topology; `measure` says how local a routing is, in quantities that mean the same for every topology (`latent`).
Nothing here is a measurement of the model it is made for. Commands: `python -m traces.assumed`.
"""
