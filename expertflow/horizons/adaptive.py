"""The adaptive step size of ExpertFlow (arXiv 2510.26730): S = N_e · E_s / (C_s · T_l), then feedback.

N_e experts expected per layer, E_s bytes of one, C_s link bandwidth, T_l time of one layer without stall.
Numbers that the paper leaves open are parameters; which way each feedback pushes follows its readers.
"""

from __future__ import annotations

from collections.abc import Sequence

from expertflow.forward import KnownForward
from expertflow.future import Future
from expertflow.horizons.decision_account import DecisionAccount
from expertflow.horizons.feedback import StepFeedback
from expertflow.horizons.formula import StepFormula
from expertflow.parts import Horizon
from expertflow.view import Feedback, View


class AdaptiveHorizon(Horizon):
    """Distances 1 … S.

    Every forward the formula is evaluated on exponential means (`memory`, 0.9 = a tenth new) of what was
    observed. Feedback owns S until the formula moves by `formula_jump` or more. `stall_threshold` layers that
    stalled give S + 1, `overfetch_threshold` needless prefetches give S - 1; a change resets both counters and
    is followed by `cooldown_forwards` without another; both counters halve every forward. `count` says what is
    a stall: `any`, or `late` alone, the default: a wait for an expert that was on its way asks for an earlier
    start, but a miss was not foreseen, and looking farther does not help it (results/LOG.md). `dist_exponent`
    corrects N_e by how diverse the batch is: times (Dist per pair of tokens / its running mean) to this power,
    where the trace holds embeddings; 0, the default, is off, since how Dist enters is not published.
    `decision_share`, our own, guards against decisions that cost more host time than they save: a `DecisionAccount`
    caps the step, down to nothing, so that no more than about this share of what prefetch saves is spent on them, and
    tries again every `retry_forwards`. 0, the default, is off.
    """

    def __init__(
        self,
        max_distance: int = 8,
        memory: float = 0.9,
        stall_threshold: int = 3,
        overfetch_threshold: int = 8,
        formula_jump: int = 2,
        cooldown_forwards: int = 1,
        count: str = "late",
        dist_exponent: float = 0.0,
        decision_share: float = 0.0,
        retry_forwards: int = 256,
    ) -> None:
        if max_distance < 1:
            raise ValueError(f"AdaptiveHorizon max_distance={max_distance} must be at least 1")
        if not 0 <= memory < 1:
            raise ValueError(f"AdaptiveHorizon memory={memory} must be in [0, 1)")
        if stall_threshold < 1 or overfetch_threshold < 1:
            raise ValueError("AdaptiveHorizon thresholds must be at least 1")
        if dist_exponent < 0:
            raise ValueError(f"AdaptiveHorizon dist_exponent={dist_exponent} must be 0 (off) or more")
        if formula_jump < 1 or cooldown_forwards < 0:
            raise ValueError(
                f"AdaptiveHorizon formula_jump={formula_jump} must be at least 1, "
                f"cooldown_forwards={cooldown_forwards} at least 0"
            )
        if decision_share < 0 or retry_forwards < 1:
            raise ValueError(
                f"AdaptiveHorizon decision_share={decision_share} must be 0 (off) or more, "
                f"retry_forwards={retry_forwards} at least 1"
            )
        if count not in ("any", "late"):
            raise ValueError(f"AdaptiveHorizon count={count!r} is unknown; choose any or late")
        self.max_distance = max_distance
        self.memory = memory
        self.stall_threshold = stall_threshold
        self.overfetch_threshold = overfetch_threshold
        self.formula_jump = formula_jump
        self.cooldown_forwards = cooldown_forwards
        self.count = count
        self.dist_exponent = dist_exponent
        self.decision_share = decision_share
        self.retry_forwards = retry_forwards

    def start(self, view: View, future: Future | None) -> None:
        self.view = view
        self.limit = max(1, min(view.num_layers - 1, self.max_distance))
        self.formula = StepFormula(view, self.limit, self.memory, self.dist_exponent)
        self.asked = 0
        """What the formula asked for when it last moved by `formula_jump`; 0 = nothing yet."""
        self.signs = StepFeedback(view, self.stall_threshold, self.overfetch_threshold, self.cooldown_forwards)
        self.account: DecisionAccount | None = None
        if self.decision_share:
            self.account = DecisionAccount(view, self.limit, self.decision_share, self.retry_forwards, self.memory)
        self._windows = [list(range(1, size + 1)) for size in range(self.limit + 1)]
        self._set(1 if view.num_layers > 1 else 0)

    def _set(self, size: int) -> None:
        self.size = size
        self.signs.clear()

    @property
    def cap(self) -> int:
        """How far decisions may look."""
        return self.limit if self.account is None else self.account.cap

    def distances(self) -> Sequence[int]:
        if self.account is not None and self.account.spent():
            return ()
        return self._windows[self.size]

    def begin_forward(self, forward: KnownForward) -> None:
        self.signs.halve()
        asked = self.formula.evaluate(self.num_expected or self.view.top_k, forward)
        if self.view.num_layers == 1:
            return
        raised = self.account is not None and self.account.judge(forward.index, self.formula.copy_ns)
        if asked and (self.asked == 0 or abs(asked - self.asked) >= self.formula_jump):
            self.asked = asked
            self._set(min(asked, self.cap))
        elif raised:
            self._set(min(max(self.size, self.asked, 1), self.cap))
        elif self.size > self.cap:
            self._set(self.cap)
        if self.account is not None:
            self.account.begin(forward.index, self.size)

    def feedback(self, feedback: Feedback) -> None:
        if self.account is not None:
            self.account.heard(feedback)
        if feedback.stall_ns > 0 and (self.count == "any" or feedback.num_late > 0):
            self._step(self.signs.stalled())

    def overfetched(self) -> None:
        if self.size > 1:
            self._step(self.signs.overfetched())

    def evicted(self, key: int, unused: bool) -> None:
        if unused:
            self._step(self.signs.overfetched())

    def _step(self, change: int) -> None:
        if not change:
            return
        size = min(max(self.size + change, 1), self.cap)
        if size != self.size:
            self.signs.changed()
            self._set(size)
