"""Energy as counts times published constants, never measured; and what of a model no matrix does, counted by hand."""

from collections.abc import Mapping

from ..config import SpikeGPTConfig

# pJ an operation in 45 nm at 0.9 V: M. Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC
# 2014. A MAC is the sum of its multiply and its add, so int8's accumulator is taken as 8 bit wide; with a 32-bit one
# it is 0.3. Reads are of 32 bit, half of the source's 64 (10 pJ, 100 pJ, and for DRAM the low end of 1.3 to 2.6 nJ,
# commonly rounded to 640 pJ).
ENERGY = {
    "fp32_add": 0.9,
    "fp32_multiply": 3.7,
    "fp32_mac": 4.6,
    "int8_add": 0.03,
    "int8_multiply": 0.2,
    "int8_mac": 0.23,
    "int32_add": 0.1,
    "read_sram_8_kib": 5.0,
    "read_sram_1_mib": 50.0,
    "read_dram": 640.0,
}
PLACES = {place.removeprefix("read_"): pj for place, pj in ENERGY.items() if place.startswith("read_")}  # 32 bit
SHARED = (1, 8)  # tokens that one read of a weight serves
LONG = 5  # multiplications and additions that an exp, and a division, are counted as


def arithmetic_energy(macs: float, acs: float) -> dict[str, float]:
    """Energy in pJ of so many operations (per token, if they are): counts times `ENERGY`, nothing else.

    No memory, no control, no leakage, no chip: on most hardware moving the weights (`memory_energy`) costs more. "fp32"
    is the convention of the literature; "int8" of the dense count, `arithmetic_energy(dense_macs, 0)`, is what spikes
    have to beat: an ordinary integer accelerator without any sparsity.
    """
    return {kind: macs * ENERGY[f"{kind}_mac"] + acs * ENERGY[f"{kind}_add"] for kind in ("fp32", "int8")}


def memory_energy(reads: float) -> dict[str, float]:
    """Energy in pJ of reading so many 32-bit values: counts times `ENERGY`, by where the weights lie."""
    return {place: reads * pj for place, pj in PLACES.items()}


def with_reads(dense: float, reads: float, additions: float | None) -> dict[str, dict]:
    """Energy in pJ of arithmetic and weight reads together, weights of one byte: `{"sram_8_kib": {"1": {...}}}`, by
    where the weights lie and by how many tokens one read of a weight serves.

    dense_int8: every weight read once for so many tokens, every product made. skipping_int8: no product with a 0; read
        is each weight once for so many tokens, or for each token those that it needs, whichever is less. spiking:
        32-bit additions of bit planes, for each token its own reads; left out where `additions` is None. break_even:
        below this density of nonzero inputs, each with as many planes as here, spiking takes less than dense_int8:

            density * (m + 0.1 planes) < m / tokens + 0.23        m pJ a weight read, 0.1 an addition, 0.23 a MAC

    Args:
        dense: pairs of an input and a row. reads: those whose input is not 0. additions: of bit planes.
    """
    found: dict[str, dict] = {}
    mac, add = ENERGY["int8_mac"], ENERGY["int32_add"]
    for place, pj in PLACES.items():
        m, of_place = pj / 4, found.setdefault(place, {})
        for tokens in SHARED:
            one = of_place[str(tokens)] = {"dense_int8": dense * (m / tokens + mac)}
            one["skipping_int8"] = min(reads, dense / tokens) * m + reads * mac
            if additions is not None and reads:
                one["spiking"] = reads * m + additions * add
                one["break_even"] = (m / tokens + mac) / (m + add * additions / reads)
    return found


def real_valued(config: SpikeGPTConfig) -> dict[str, dict[str, float]]:
    """What stays real-valued beside the matrices: multiplications and additions a token, by part, from sizes alone.

    Convention: fp32; exp and division are LONG multiplications and as many additions each, a comparison is an addition;
    products of constants are made once. With `wkv_powers_of_two` exp is gone and a product is a shift, counted as an
    addition. norms: their statistics, and what is done to a channel, or behind a matrix that reads the residual stream
    itself to a row. Without integer spikes "neurons" is squared ReLU.
    """
    L, C, hidden = config.n_layer, config.n_embd, config.n_ffn or 4 * config.n_embd
    integer, rows = config.matrix_spikes == "integer", 5 * C + (hidden - C)
    by_rows = config.token_shift == "rows"
    read = rows if integer and by_rows else 2 * C
    mixed = rows if by_rows else 5 * C
    spiking = (C + hidden + (0 if by_rows else 5 * C)) if integer else hidden
    wkv = (LONG, 18 + LONG) if config.wkv_powers_of_two else (6 + 5 * LONG, 12 + 5 * LONG)
    parts = {
        "norms": (2 * C + 2 * read, 6 * C + (3 if integer and by_rows else 2) * read),
        "token_shift": (2 * mixed, mixed),
        "wkv": (wkv[0] * C, wkv[1] * C),
        "gates": (2 * C * (2 * LONG + 1), 2 * C * (2 * LONG + 1)),
        "neurons": (spiking, spiking),
        "lif": (2 * C, 8 * C),
    }
    return {name: {"multiplications": L * made[0], "additions": L * made[1]} for name, made in parts.items()}


def real_valued_energy(parts: Mapping[str, Mapping[str, float]]) -> float:
    """pJ a token of what `real_valued` counts, in fp32."""
    return sum(
        part["multiplications"] * ENERGY["fp32_multiply"] + part["additions"] * ENERGY["fp32_add"]
        for part in parts.values()
    )
