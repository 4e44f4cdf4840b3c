"""One recording: a located model runs over prompts, and each answer becomes a request of the trace."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from traces.container import TraceError
from traces.reader import open_trace
from traces.recorded_batches import settings_line
from traces.recorder.generate import PROJECTION_SEED, Answer, Projection, Prompt, Sampling, record_batches
from traces.recorder.load import first_line
from traces.recorder.locate import Located
from traces.recorder.lookahead import Recall
from traces.recorder.options import RecordOptions
from traces.recorder.recording import Recording, Rows
from traces.stream import TraceWriter, config_of


class Session:
    """options: of the command. num_listed: candidates of the pre-gate, 0 = twice top-k, None = all scores.

    ValueError on sizes that the model does not have, before a file is begun.
    """

    def __init__(
        self, options: RecordOptions, network: Any, located: Located, sampling: Sampling, num_listed: int | None
    ) -> None:
        self._options, self._network, self._located = options, network, located
        self._sampling, self._num_listed = sampling, num_listed
        self._recording(lambda rows: None)
        self._project: Projection | None = None
        if options.embedding_dims:
            self._project = Projection(network.get_input_embeddings(), options.embedding_dims)
        self._recall = Recall(len(located.taps), options.lookahead) if options.lookahead else None

    def record(self, prompts: Sequence[Prompt], progress: Progress | None) -> str:
        """Run over `prompts` and write the trace; what to tell the user."""
        options, located = self._options, self._located
        task = progress.add_task("recording", total=len(prompts)) if progress is not None else None
        name = Path(options.model).name
        with TraceWriter(
            options.out,
            model=options.name or name.lower(),
            num_experts=located.num_experts,
            license=options.license,
            source=f"recorded from {name}",
            moe_layer_ids=located.moe_layer_ids,
            config=self._network.config.to_json_string(),
            **self._header(),
        ) as writer:
            batches = record_batches(self._network, self._recording, iter(prompts), options.batch_size, self._sampling)
            for answer in _in_memory(batches):
                self._append(writer, answer)
                if progress is not None and task is not None:
                    progress.advance(task)
        size = f"{writer.num_requests} requests, {writer.num_tokens} tokens × {len(located.taps)} layers"
        lines = [f"wrote {options.out}: {size}"]
        if self._recall is not None:
            lines.append(_recall_table(self._recall, located.top_k))
        settings = settings_line(open_trace(options.out, validate=False), options.out)
        if settings is not None:
            lines.append(f"note: {settings}")
        config = config_of(options.out)
        lines.append(f"note: the model's sizes are in {config}; run them by model.path={config}")
        return "\n".join(lines)

    def _recording(self, on_forward: Callable[[Rows], None]) -> Recording:
        return Recording(
            self._network,
            self._located.taps,
            num_experts=self._located.num_experts,
            top_k=self._located.top_k,
            lookahead=self._options.lookahead,
            full=self._num_listed is None,
            num_listed=self._num_listed or 0,
            logits=self._options.logits,
            on_forward=on_forward,
        )

    def _header(self) -> dict[str, str]:
        """How the trace was recorded."""
        options = self._options
        header = {
            "capture": "hooks on a Hugging Face model (traces.recorder)",
            "source_model": Path(options.model).name,
            "architecture": type(self._network).__name__,
            "dtype": str(self._network.dtype).removeprefix("torch."),
            "sampling": options.sampling,
            "max_new_tokens": str(options.max_new_tokens),
            "seed": str(options.seed),
            "batch_size": str(options.batch_size),
            "prompts": Path(options.prompts).name,
        }
        if self._project is not None:
            dims = options.embedding_dims
            drawn = f"standard_normal of NumPy's default_rng({PROJECTION_SEED}), over sqrt({dims})"
            header["embedding_projection"] = f"input embeddings × {drawn}"
        return header

    def _append(self, writer: TraceWriter, answer: Answer) -> None:
        """One answer as a request; of the pre-gates the trace will hold the one that is best by now."""
        if self._recall is not None:
            self._recall.add(answer.rows.hits, answer.rows.arrays["experts"])
            writer.variant = self._recall.best()
            writer.header |= _pregate_header(self._recall)
        arrays = dict(answer.rows.arrays)
        if self._project is not None:
            arrays["embedding"] = self._project(answer.token_ids)
        writer.append(
            prompt_len=len(answer.prompt.tokens),
            context_len=0,
            label=answer.prompt.label,
            token_ids=answer.token_ids,
            forward_id=answer.forward_id,
            **arrays,
        )


def _in_memory(answers: Iterator[Answer]) -> Iterator[Answer]:
    """Yield the answers.

    A device with too little memory becomes a TraceError with a remedy: the user chose the sizes.
    """
    try:
        yield from answers
    except torch.OutOfMemoryError as error:
        problem = f"the device ran out of memory ({first_line(error)})"
        raise TraceError(f"{problem}; lower batch_size or max_new_tokens, or shorten the prompts") from None


def _pregate_header(recall: Recall) -> dict[str, str]:
    """Which pre-gate the trace holds, and how good both were."""
    table = {kind: [round(value, 4) for value in values] for kind, values in recall.by_distance().items()}
    return {"pregate": recall.best(), "pregate_recall": json.dumps(table)}


def _recall_table(recall: Recall, top_k: int) -> str:
    table, best = recall.by_distance(), recall.best()
    width = max(len(kind) for kind in table) + len(" (kept)")
    distances = range(1, recall.distances + 1)
    lines = [f"{f'recall@{top_k}':<{width}}" + "".join(f"{f'd={d}':>9}" for d in distances)]
    for kind, values in table.items():
        shown = f"{kind} (kept)" if kind == best else kind
        lines.append(f"{shown:<{width}}" + "".join(f"{value:9.1%}" for value in values))
    return "\n".join(lines)
