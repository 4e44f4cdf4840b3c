"""`python -m traces.assumed`: fit the families to recordings, measure a trace, write an assumed trace to a file.

A user's error is one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from traces.assumed.families import FAMILIES, FORMAT, SETTINGS, USUAL
from traces.assumed.fit import QUANTILES, fit_families
from traces.assumed.made import SOURCE, Assumed, arrays_of, check_size, memory_of, usual_size
from traces.assumed.measure import LAGS, beyond_chance, measure, share_of_top_tenth
from traces.assumed.routing import Topology
from traces.files import replace_text
from traces.flags import Parser, whole
from traces.format import About, write_trace
from traces.layout import MAX_EXPERTS
from traces.limits import check_bytes
from traces.messages import PREFIX, TraceError, fault, told
from traces.processes.ending import keeping, stopped
from traces.reader import Trace, open_trace

_HELD_OUT = re.compile(r"(^|[^a-z])(eval|test|held.?out)([^a-z]|$)")
EXAMPLES = """examples:
  python -m traces.assumed generate qwen3.safetensors --layers 94 --experts 128 --top-k 8 --locality usual
  python -m traces.assumed measure mine.safetensors
  python -m traces.assumed fit a.train.safetensors b.train.safetensors --out families.json"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; the exit code."""
    try:
        with keeping("nothing was written; give the same command again"):
            args = _parser().parse_args(argv)
            return int(args.run(args))
    except (ValueError, OSError, MemoryError) as error:
        print(f"{PREFIX}{told(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        return stopped(error)


def _parser() -> Parser:
    about = "Assumed routing: fit its families, measure a trace, write an assumed trace."
    kind = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="python -m traces.assumed", description=about, epilog=EXAMPLES, formatter_class=kind)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    made = commands.add_parser("generate", help="write an assumed trace")
    made.add_argument("output", type=Path, help="the trace to write (.safetensors)")
    made.add_argument("--layers", type=whole(1, 1024), required=True, help="MoE layers")
    made.add_argument("--experts", type=whole(2, MAX_EXPERTS), required=True, help="of a layer")
    made.add_argument("--top-k", type=whole(1, MAX_EXPERTS), required=True, help="experts that a token takes")
    made.add_argument("--locality", choices=SETTINGS, default=USUAL)
    made.add_argument("--tokens", type=whole(1, 1_000_000), help="of all requests (default: by topology)")
    made.add_argument("--requests", type=whole(1, 1_000_000), help="default: 8")
    made.add_argument("--seed", type=whole(0, 2**63 - 1), default=0)
    made.add_argument("--model", default="assumed", help="its name in conf/model, for the header")
    made.set_defaults(run=_generate)
    seen = commands.add_parser("measure", help="print how local a trace is")
    seen.add_argument("trace", help="a trace file, or a quoted glob")
    seen.set_defaults(run=_measure)
    fit = commands.add_parser("fit", help="fit the families to recordings")
    fit.add_argument("traces", nargs="+", help="recorded traces; none that is kept to judge by")
    fit.add_argument("--out", type=Path, default=FAMILIES, help="the file to write (default: the shipped one)")
    fit.set_defaults(run=_fit)
    return parser


def _generate(args: argparse.Namespace) -> int:
    if args.top_k > args.experts:
        raise TraceError(f"--top-k {args.top_k} is more than --experts {args.experts}; a token takes some of a layer's")
    topology = Topology(args.layers, args.experts, args.top_k)
    size = usual_size(topology, args.tokens, args.requests)
    check_size(size, "--tokens ", "--requests ")
    check_bytes(args.output, "arrays", memory_of(topology, size))
    asked = Assumed(topology, args.locality, size, args.seed)
    about = About(args.model, args.experts, f"{SOURCE} ({asked.name})", "CC0-1.0")
    write_trace(args.output, arrays_of(asked), about)
    print(f"{args.output}: {asked.name}, {asked.size.num_tokens} tokens in {asked.size.num_requests} requests")
    return 0


def _measure(args: argparse.Namespace) -> int:
    trace = open_trace(args.trace)
    routing = np.asarray(trace.experts), np.asarray(trace.request_start), trace.num_experts
    found = measure(*routing)
    print(f"{trace.name}: {trace.num_layers}x{trace.num_experts} top {trace.top_k}, {trace.num_tokens} tokens")
    print("correlation of an expert's scores, mean over layers")
    print(f"  across requests      {np.mean(found.popularity):.3f}")
    print(f"  best of layer before {np.mean(found.depth) if len(found.depth) else np.nan:.3f}")
    for lag, row in zip(LAGS, found.lags, strict=True):
        print(f"  {lag:3} tokens apart     {np.mean(row):.3f}")
    print(f"share of the most chosen tenth of experts {share_of_top_tenth(*routing):.3f}")
    print(f"overlap with the token before beyond chance {beyond_chance(*routing, 1):.3f}")
    return 0


def _fit(args: argparse.Namespace) -> int:
    if not args.out.absolute().parent.is_dir():
        raise fault(args.out, "file", f"the folder {args.out.absolute().parent} does not exist", "create it first")
    traces = [_to_fit(path) for path in args.traces]
    first = traces[0]
    for other in traces[1:]:
        if (other.num_experts, other.top_k) != (first.num_experts, first.top_k):
            problem = f"has {other.num_experts} experts, top {other.top_k}; {first.name} {first.num_experts}, "
            raise fault(other.paths[0], "header", problem + f"top {first.top_k}", "fit to recordings of one kind")
    found = {
        "format": FORMAT,
        "settings": {name: asdict(family) for name, family in fit_families(traces).items()},
        "quantiles": QUANTILES,
        "fitted_to": [_described(trace) for trace in traces],
        "command": "python -m traces.assumed fit " + " ".join(f"{trace.name}.safetensors" for trace in traces),
    }
    replace_text(args.out, json.dumps(found, indent=1) + "\n")
    print(f"wrote {args.out}: {', '.join(SETTINGS)}, fitted to {len(traces)} recordings")
    return 0


def _to_fit(path: str) -> Trace:
    if _HELD_OUT.search(Path(path).name.lower()):
        raise fault(path, "file", "is named as one to judge by", "fit to recordings that nothing is judged on")
    return open_trace(path)


def _described(trace: Trace) -> dict[str, str | int]:
    return {
        "name": trace.name,
        "model": trace.model,
        "num_tokens": trace.num_tokens,
        "num_requests": trace.num_requests,
        "sha256": trace.sha256(),
        "source": trace.header["source"],
        "license": trace.header["license"],
    }
