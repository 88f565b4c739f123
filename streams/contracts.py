"""The feature sets: ordered names, formulas, parameters, neutral values, and their hash.

One definition a name, shared by every set, so that a name cannot mean two things. The hash of a
set is written into every artifact that is trained on it and checked when one is loaded.
`docs/features.md` is the same table for readers.

Notation: C, H, L, O, V are close, high, low, open and volume at bar t; X[k] is X k bars back.
EMA_n is e <- e + 2/(n+1) (x - e), seeded with the first x. SMA_n and SD_n run over the last n
bars in two passes, SD with n-1 in the denominator and on C[k] - C.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Definition:
    """One feature: its formula, its parameters and its value where a denominator is 0.

    `column` names the kernel's output; several names may share one (`rsi` is `rsi_14`).
    """

    column: str
    formula: str
    parameters: tuple[tuple[str, float], ...] = ()
    neutral: float | None = None


def _d(column: str, formula: str, neutral: float | None = None, **parameters: float) -> Definition:
    return Definition(column, formula, tuple(sorted(parameters.items())), neutral)


_RSI = _d("rsi_14", "100-100/(1+G/D); G,D=SMA_n of rises,falls of C; D=0:100", 50.0, n=14)
_VOLATILITY = _d("volatility_20", "SD_n(C)/C", n=20)
_MOMENTUM_10 = _d("momentum_10", "C/C[n]-1", n=10)


def _ema(n: int) -> Definition:
    return _d(f"ema_{n}", "EMA_n(C)", n=n)


def _ema_distance(n: int) -> Definition:
    return _d(f"ema_{n}_dist", "(C-EMA_n(C))/C", n=n)


def _cross(fast: int, slow: int) -> Definition:
    return _d(f"ema_{fast}_{slow}_cross", "1 if EMA_fast(C)>EMA_slow(C) else 0", fast=fast, slow=slow)


DEFINITIONS: Mapping[str, Definition] = MappingProxyType(
    {
        "open": _d("open", "O"),
        "high": _d("high", "H"),
        "low": _d("low", "L"),
        "close": _d("close", "C"),
        "volume": _d("volume", "V"),
        "price_change": _d("price_change", "C/C[1]-1"),
        "rsi_14": _RSI,
        "macd": _d("macd", "EMA_fast(C)-EMA_slow(C)", fast=12, slow=26),
        "volume_ratio": _d("volume_ratio", "V/SMA_n(V)", 1.0, n=20),
        "momentum_10": _MOMENTUM_10,
        "high_low_range": _d("high_low_range", "(H-L)/C"),
        "volume_change": _d("volume_change", "V/V[1]-1", 0.0),
        "volume_ma_ratio": _d("volume_ma_ratio", "V/SMA_n(V)", 1.0, n=10),
        "ema_10": _ema(10),
        "ema_20": _ema(20),
        "ema_50": _ema(50),
        "ema_10_20_cross": _cross(10, 20),
        "ema_10_50_cross": _cross(10, 50),
        "volatility_20": _VOLATILITY,
        "macd_signal": _d("macd_signal", "EMA_n(macd)", n=9),
        "macd_hist": _d("macd_hist", "macd-macd_signal"),
        "bb_position": _d("bb_position", "(C-(SMA_n-k SD_n))/(2k SD_n), on C", 0.5, n=20, k=2),
        "momentum_20": _d("momentum_20", "C/C[n]-1", n=20),
        # v2's names
        "volatility": _VOLATILITY,
        "rsi": _RSI,
        "momentum": _MOMENTUM_10,
        # v6's names
        "returns": _d("price_change", "C/C[1]-1"),
        "log_returns": _d("log_returns", "ln(C/C[1])"),
        "price_range": _d("high_low_range", "(H-L)/C"),
        "body_size": _d("body_size", "|C-O|/C"),
        "upper_wick": _d("upper_wick", "(H-max(C,O))/C"),
        "lower_wick": _d("lower_wick", "(min(C,O)-L)/C"),
        "is_doji": _d("is_doji", "1 if body_size<limit else 0", limit=0.001),
        "is_hammer": _d("is_hammer", "1 if lower_wick>2 body_size and upper_wick<body_size else 0"),
        "is_engulfing": _d("is_engulfing", "1 if body_size>1.5 body_size[1] else 0"),
        "gap_up": _d("gap_up", "1 if O>C[1](1+limit) else 0", limit=0.002),
        "gap_down": _d("gap_down", "1 if O<C[1](1-limit) else 0", limit=0.002),
        "stoch_k": _d("stoch_k", "100(C-min_n(L))/(max_n(H)-min_n(L))", 50.0, n=14),
        "stoch_d": _d("stoch_d", "SMA_n(stoch_k)", n=3),
        "roc": _d("roc", "100(C/C[n]-1)", n=10),
        "ema_9": _ema(9),
        "ema_9_dist": _ema_distance(9),
        "ema_21": _ema(21),
        "ema_21_dist": _ema_distance(21),
        "ema_50_dist": _ema_distance(50),
        "ema_200": _ema(200),
        "ema_200_dist": _ema_distance(200),
        "sma_20": _d("sma_20", "SMA_n(C)", n=20),
        "sma_50": _d("sma_50", "SMA_n(C)", n=50),
        "adx": _d("adx", "SMA_n(100|plus_di-minus_di|/(plus_di+minus_di))", 0.0, n=14),
        "plus_di": _d("plus_di", "100 SMA_n(H-H[1] where it exceeds L[1]-L and 0, else 0)/atr", 0.0, n=14),
        "minus_di": _d("minus_di", "100 SMA_n(L[1]-L where it exceeds H-H[1] and 0, else 0)/atr", 0.0, n=14),
        "bb_middle": _d("sma_20", "SMA_n(C)", n=20),
        "bb_upper": _d("bb_upper", "SMA_n+k SD_n, on C", n=20, k=2),
        "bb_lower": _d("bb_lower", "SMA_n-k SD_n, on C", n=20, k=2),
        "bb_width": _d("bb_width", "(bb_upper-bb_lower)/bb_middle", n=20, k=2),
        "atr": _d("atr", "SMA_n(max(H-L,|H-C[1]|,|L-C[1]|))", n=14),
        "atr_pct": _d("atr_pct", "atr/C", n=14),
        "volume_sma": _d("volume_sma", "SMA_n(V)", n=20),
        "obv": _d("obv", "0 at the first bar; +V on a rise of C, -V on a fall"),
        "obv_ema": _d("obv_ema", "EMA_n(obv)", n=20),
        "vpt": _d("vpt", "0 at the first bar; running sum of V x returns"),
        "momentum_5": _d("momentum_5", "C/C[n]-1", n=5),
        "acceleration": _d("acceleration", "momentum_n - momentum_n[1]", n=10),
        "relative_spread": _d("relative_spread", "(H-L)/((H+L)/2)"),
    }
)


@dataclass(frozen=True)
class FeatureSet:
    """An ordered list of features and the bar from which on all of them are ready.

    `longest_window` is the least `warmup_bars` that may be set: below it a feature is undefined.
    """

    name: str
    features: tuple[str, ...]
    warmup_bars: int
    longest_window: int

    @cached_property
    def contract(self) -> str:
        """SHA-256 (hex) over the name, the order, the formulas, parameters and neutral values."""
        described = [
            [name, d.column, d.formula, list(d.parameters), d.neutral]
            for name, d in ((name, DEFINITIONS[name]) for name in self.features)
        ]
        text = json.dumps([self.name, described], separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.features)


V3 = FeatureSet(
    "v3",
    tuple(
        "open high low close volume price_change rsi_14 macd volume_ratio momentum_10 high_low_range "
        "volume_change volume_ma_ratio ema_10 ema_20 ema_50 ema_10_20_cross ema_10_50_cross "
        "volatility_20 macd_signal macd_hist bb_position momentum_20".split()
    ),
    warmup_bars=100,
    longest_window=21,
)

V2 = FeatureSet(
    "v2",
    tuple("close high low volume volatility rsi macd momentum".split()),
    warmup_bars=100,
    longest_window=20,
)

V6 = FeatureSet(
    "v6",
    tuple(
        "returns log_returns price_range body_size upper_wick lower_wick is_doji is_hammer "
        "is_engulfing gap_up gap_down rsi macd macd_signal macd_hist stoch_k stoch_d roc ema_9 "
        "ema_9_dist ema_21 ema_21_dist ema_50 ema_50_dist ema_200 ema_200_dist sma_20 sma_50 adx "
        "plus_di minus_di bb_middle bb_upper bb_lower bb_width bb_position atr atr_pct volatility "
        "volume_sma volume_ratio obv obv_ema vpt momentum_5 momentum_10 momentum_20 acceleration "
        "relative_spread".split()
    ),
    warmup_bars=250,
    longest_window=50,
)

FEATURE_SETS: Mapping[str, FeatureSet] = MappingProxyType({s.name: s for s in (V3, V2, V6)})

SET_OF_WIDTH: Mapping[int, FeatureSet] = MappingProxyType({len(s): s for s in FEATURE_SETS.values()})
"""What an unnamed artifact of exactly this many features was trained on."""


def union(sets: Sequence[FeatureSet]) -> tuple[str, ...]:
    """The names of all `sets` in order of first appearance, each once."""
    return tuple(dict.fromkeys(name for s in sets for name in s.features))
