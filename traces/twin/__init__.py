"""Twins: narrow language models with the routing topology of a large MoE model, trained and recorded on any machine.

A twin has the MoE layers, experts and top-k of its original and is 16 or more times narrower; it learns from text that
every Python installation carries. Its traces show routing that was learned, with everything a trace can hold, where
the original's weights are not at hand. They are no recordings of the original, and no figure about it follows from
them.

`config` holds the topologies, `text` documents and tokenizer, `model` the network, `checkpoint` what is kept between
runs, `train` the loop, `record` full traces, `compact` small ones, `check` whether routing was learned; `cli` is
`python -m traces.twin`. Only `model`, `train`, `record`, `check` and the weights of `checkpoint` need torch.
"""
