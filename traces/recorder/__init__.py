"""Recording the routing of a PyTorch model while it runs.

`recording` holds the hooks, for any `nn.Module` whose routers are named; `lookahead` the pre-gate's arithmetic;
`locate` finds the routers of a Hugging Face model; `generate` runs one over prompts; `command` is
`python -m traces record`. All but `command` and this file need torch, `locate`, `generate` transformers as well.
"""
