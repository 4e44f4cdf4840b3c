"""The boundary between a policy's parts and the rest: whose class a part is, and what is said of who breaks a rule.

What parts are asked is checked in `expertflow.checks`, where it enters; docs/contract.md lists the rules. The checks
are there against mistakes and wishful policies, not against code that walks the interpreter.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from inspect import isfunction
from itertools import islice
from operator import countOf, index
from typing import Any

import numpy as np

from expertflow.keys import literal, plain
from expertflow.parts import Effort, Eviction, Horizon, Order, Part, Place, Predictor, Selection
from expertflow.view import View

_OWN = __name__.partition(".")[0] + "."
MOST_CHARACTERS = 300 - len("error: ")
"""Of a message to the user, which is one line of 300 and begins so."""
SCOPES = ("global", "layer")


class PartError(ValueError):
    """A part has broken a rule of the contract, or has raised: one line with its class, the rule, forward and layer."""


class Interruption(BaseException):
    """Ends a run from outside its parts, as KeyboardInterrupt does: no part has raised it, and no guard holds it up."""


INTERRUPTIONS = (KeyboardInterrupt, Interruption)
"""What passes every guard; whatever else comes out of a part is the part's."""


class Checking:
    """Whose answers are checked: all but those of this package's own classes, which cost nothing; with `own` these too,
    as the tests want it."""

    def __init__(self) -> None:
        self.own = False


CHECKING = Checking()


def is_own(part: object) -> bool:
    """Whether the class of `part` is exactly one that a module of this package defines.

    What a class says of itself is not taken for it: its module must hold it under its name.
    """
    return is_own_class(type(part))


def is_own_class(kind: object) -> bool:
    """The same of a class."""
    if not isinstance(kind, type):
        return False
    name = str(kind.__module__)
    return name.startswith(_OWN) and getattr(sys.modules.get(name), kind.__qualname__, None) is kind


def is_guarded(part: Part) -> bool:
    """Whether a check stands around what `part` answers."""
    return CHECKING.own or not is_own(part)


# -- what is said ----------------------------------------------------------------------------------------------------


def as_python(value: object) -> str:
    """An answer for a message, whatever it is."""
    return literal(value.item() if isinstance(value, np.generic) else value)


def words_of(error: BaseException) -> str:
    """What `error` says, in one line; nothing where it cannot say it."""
    try:
        return " ".join(str(error).split())
    except INTERRUPTIONS:
        raise
    except BaseException:
        return ""


_FOLDER = __file__.removesuffix("boundary.py")


def line_of(error: BaseException, kind: type) -> str:
    """File and line of the user's code that was running when `error` was raised: the innermost in the file of the class
    `kind`, else in any that is not of this package. Empty where there is none."""
    own = getattr(sys.modules.get(str(kind.__module__)), "__file__", None)
    found, is_of_class = "", False
    step = error.__traceback__
    while step is not None:
        file = step.tb_frame.f_code.co_filename
        if file == own or (not is_of_class and not file.startswith((_FOLDER, "<"))):
            # Folder and file are enough to find it by, and the same on every machine.
            shown = "/".join(file.replace("\\", "/").split("/")[-2:])
            found, is_of_class = f"{shown if len(shown) <= 60 else f'…{shown[-59:]}'}:{step.tb_lineno}", file == own
        step = step.tb_next
    return found


def _told(error: BaseException) -> str:
    text = words_of(error)
    return f": {text}" if text else ""


class Guard:
    """Around one part: calls its hooks, and says which rule it has broken, and where."""

    __slots__ = ("_part", "_view")

    def __init__(self, part: Part, view: View) -> None:
        self._part, self._view = part, view

    def refused(self, hook: str, rule: str, remedy: str, line: str = "") -> PartError:
        """The error for an answer that breaks `rule`. remedy: what to answer instead; line: of the code, if known."""
        where = self._where()
        head = f"{plain(type(self._part).__name__, 60)}.{hook} "
        tail = f"{line and f' at {line}'} ({where}); {remedy}"
        return PartError(head + plain(rule, max(MOST_CHARACTERS - len(head) - len(tail), 20)) + tail)

    def raised(self, hook: str, error: BaseException) -> PartError:
        """The error for a part that has raised `error`."""
        told = _told(error)
        remedy = "mend the part"
        if isinstance(error, IndexError):
            remedy = "a forward shows the layers whose routing is known"
        elif "'tuple' object has no" in told or "'mappingproxy' object has no" in told:
            remedy = "what a part is given it cannot change"
        rule = f"raised {plain(type(error).__name__, 60)}{told}"
        remedy = f"{remedy}; EXPERTFLOW_TRACEBACK=1 in the environment shows more"
        return self.refused(hook, rule, remedy, line_of(error, type(self._part)))

    def _where(self) -> str:
        view = self._view
        if view.forward < 0:
            return "before the first forward"
        # Between two forwards the layer read last is one of the forward before.
        begins = view.event < view.forward * view.num_layers
        return f"forward {view.forward}, " + ("before layer 0" if begins else f"layer {view.layer}")

    def bind(self, hook: str) -> Callable[..., Any]:
        """The part's own method."""
        try:
            found: Callable[..., Any] = getattr(self._part, hook)
        except INTERRUPTIONS:
            raise
        except BaseException as error:
            raise self.raised(hook, error) from error
        return found

    def asked(self, hook: str) -> Callable[..., Any]:
        """The part's method for a question, which answers or raises a PartError."""
        method = self.bind(hook)

        def ask(*values: Any) -> Any:
            try:
                return method(*values)
            except INTERRUPTIONS:
                raise
            except BaseException as error:
                raise self.raised(hook, error) from error

        return ask

    def told(self, hook: str) -> Callable[..., None]:
        """The part's method for a hook that has no answer."""
        method = self.bind(hook)

        def tell(*values: Any) -> None:
            try:
                answer = method(*values)
            except INTERRUPTIONS:
                raise
            except BaseException as error:
                raise self.raised(hook, error) from error
            if answer is not None:
                raise self.answered(hook, answer)

        return tell

    def told_layer_end(self) -> Callable[[int, Sequence[int]], None]:
        """The part's `layer_end`, which is given keys that it cannot change."""
        tell = self.told("layer_end")

        def layer_end(layer: int, keys: Sequence[int]) -> None:
            tell(layer, tuple(keys))

        return layer_end

    def answered(self, hook: str, answer: object) -> PartError:
        """The error for an answer where there was no question: it would have no effect, and a generator never run."""
        return self.refused(hook, f"answered {as_python(answer)}; this hook has no answer", "return nothing")

    # -- numbers -----------------------------------------------------------------------------------------------------

    def keys(self, hook: str, what: str, value: object, most: int) -> tuple[int, ...]:
        """`value`, a sequence of at most `most` whole numbers, as one that nobody can change. what: its name."""
        found: tuple[Any, ...]
        if type(value) is tuple:
            found = value
        elif type(value) is list:
            found = tuple(value)
        else:
            found = self._listed(hook, what, value, most)
        if len(found) > most:
            raise self.refused(hook, f"answered {len(found)} {what}, {most} at most", "give each once")
        if countOf(map(type, found), int) == len(found):
            return found
        return tuple(self.whole(hook, one) for one in found)

    def _listed(self, hook: str, what: str, value: object, most: int) -> tuple[Any, ...]:
        """What is in a sequence of another kind than list and tuple: one more than `most` if there are more."""
        try:
            if isinstance(value, np.ndarray) and value.ndim == 1:
                return tuple(value[: most + 1].tolist() if value.dtype.kind in "iu" else value[: most + 1])
            if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray):
                return tuple(islice(value, most + 1))
        except INTERRUPTIONS:
            raise
        except BaseException as error:
            raise self.raised(hook, error) from error
        raise self.refused(hook, f"answered {as_python(value)} for {what}", "give a list or a tuple of whole numbers")

    def drawn(self, hook: str, what: str, values: object, most: int) -> tuple[int, ...]:
        """As `keys`, of whatever can be gone through: a generator too, which runs here."""
        if not isinstance(values, Iterable) or isinstance(values, str | bytes):
            raise self.refused(hook, f"answered {as_python(values)} for {what}", "give whole numbers")
        try:
            found = tuple(islice(values, most + 1))
        except INTERRUPTIONS:
            raise
        except BaseException as error:
            raise self.raised(hook, error) from error
        return self.keys(hook, what, found, most)

    def whole(self, hook: str, value: object) -> int:
        """`value` as an int; what is none, a truth value included, is refused."""
        if type(value) is int:
            return value
        if isinstance(value, int | np.integer) and not isinstance(value, bool):
            return index(value)
        raise self.refused(hook, f"answered {as_python(value)}, which is no whole number", "give int")


# -- what is declared ------------------------------------------------------------------------------------------------

_FLAGS: dict[type[Part], tuple[str, ...]] = {
    Predictor: ("uses_future", "at_once", "predicts", "needs_pregate", "refreshes"),
    Horizon: ("uses_future", "at_once"),
    Selection: ("uses_future", "at_once"),
    Eviction: ("uses_future", "at_once"),
    Order: ("uses_future", "at_once", "strict"),
    Place: ("uses_future", "at_once"),
}
_HOOKS: dict[type[Part], frozenset[str]] = {
    kind: frozenset(
        name for base in (Part, kind) for name, one in vars(base).items() if name[0] != "_" and isfunction(one)
    )
    for kind in _FLAGS
}
"""Who is heard, and who is asked, is found out by the class."""
Declared = dict[str, object]
"""What a part declares, by attribute."""


def declared(part: object, kind: type[Part]) -> Declared:
    """What `part`, which must be of that kind, declares of itself. PartError for what is of another type.

    Asked before the part is used, whosever class it is: a configuration may have set it.
    """
    name, article = plain(type(part).__name__, 60), "an" if kind.__name__[0] in "EO" else "a"
    if not issubclass(type(part), kind):  # what it says of its class itself is not taken for it
        word = kind.__name__
        raise PartError(
            f"{name} is no {word}; the class of {article} {word.lower()} derives from expertflow.parts.{word}"
        )
    own = _declaration(part, "__dict__")
    held: dict[str, object] = own if isinstance(own, dict) else {}
    for hook in _HOOKS[kind].intersection(held):
        if hasattr(held[hook], "__wrapped__"):  # around the class's own hook, as a stopwatch puts it
            continue
        raise PartError(f"{name}.{hook} is set on the object, where a hook is not heard; define it in the class")
    found = {flag: _declaration(part, flag) for flag in _FLAGS[kind]}
    for flag, value in found.items():
        if type(value) is not bool:
            raise PartError(
                f"{name}.{flag}={as_python(value)} must be True or False; {article} {kind.__name__} declares it"
            )
    if kind is Eviction:
        scope = found["scope"] = _declaration(part, "scope")
        if type(scope) is not str or scope not in SCOPES:
            raise PartError(f"{name}.scope={as_python(scope)} is unknown; choose global or layer")
    if kind is Predictor:
        for effort in ("effort", "effort_at_once"):
            value = found[effort] = _declaration(part, effort)
            if type(value) is not Effort and (effort == "effort" or value is not None):
                raise PartError(
                    f"{name}.{effort}={as_python(value)} must be an expertflow.parts.Effort(once, per_layer)"
                )
        fitted = found["fitted_kind"] = _declaration(part, "fitted_kind")
        if type(fitted) is not str:
            raise PartError(f"{name}.fitted_kind={as_python(fitted)} must be text: the kind of a fitted file, or empty")
    return found


def _declaration(part: object, name: str) -> object:
    try:
        return getattr(part, name)
    except INTERRUPTIONS:
        raise
    except BaseException as error:
        kind = plain(type(error).__name__, 60)
        raise PartError(
            plain(f"{plain(type(part).__name__, 60)}.{name} raised {kind}{_told(error)}", MOST_CHARACTERS)
        ) from error


def check_unchanged(guard: Guard, part: Part, kind: type[Part], before: Declared) -> None:
    """PartError if `part` declares something else than when the run was set up, which has been counted on since."""
    try:
        same = all(getattr(part, name) is value for name, value in before.items())
        if same and _HOOKS[kind].isdisjoint(vars(part)):
            return
    except INTERRUPTIONS:
        raise
    except BaseException as error:
        raise guard.raised("declarations", error) from error
    now = declared(part, kind)
    for name, value in before.items():
        if now[name] != value:
            rule = f"is {as_python(now[name])} now and was {as_python(value)} when the run was set up"
            raise guard.refused(name, rule, "declare it in the class or in __init__")
