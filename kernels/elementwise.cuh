// What is done to each element, whatever its place in memory.
//
// Every operation is rounded by itself, as NumPy does it, but for multiply_add, which norms within a sample and second
// order use: the same statistics give the same bits, and the pass that goes back sees the very value whose sign ReLU
// saw.
//
// `Channels`, a template parameter throughout, knows the channels of a pack's elements: usual(e) are the factors of
// element e in the dtype of the arithmetic. any_wide tells whether float32 is too narrow for one of the channels; all
// is done more slowly then: is_wide(e) tells for which elements, and wide(e) are their factors in float64.
// gate_is_wide(e) tells it for ReLU, which on the way back decides as it has done on the way forward, whatever is wide
// since then.
//
// What is asked for, flags and gates, is chosen once, outside loops: the compiler knows it where all this is inlined.
#pragma once
#include "channel.cuh"

// The numbers of a channel in the dtype A, in which elements are computed with them.
template <class A>
struct Factors {
    A center, rstd, scale, shift, slope, offset;

    DEVICE Factors() {}
    DEVICE explicit Factors(const Channel& channel)
        : center((A)channel.center), rstd((A)channel.rstd), scale((A)channel.scale), shift((A)channel.shift),
          slope((A)channel.slope), offset((A)channel.offset) {}
};

// A product that never becomes part of a fused multiply-add.
DEVICE float mul(float a, float b) { return __fmul_rn(a, b); }
DEVICE double mul(double a, double b) { return __dmul_rn(a, b); }

// a * b + c, rounded once.
DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEVICE double multiply_add(double a, double b, double c) { return __fma_rn(a, b, c); }

// The dtype in which a pack's elements are computed: that of the arithmetic, or float64 if some are WIDE.
template <bool WIDE>
struct Arithmetic {
    typedef acc_t type;
};
template <>
struct Arithmetic<true> {
    typedef double type;
};

// (x - center) * scale + shift: without a residual the value whose sign decides what ReLU passes.
template <class A>
DEVICE A affine(A x, const Factors<A>& f) {
    return mul(x - f.center, f.scale) + f.shift;
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward

// Whether there are a residual and ReLU, known to the compiler.
struct Flags {
    bool residual, relu;
};

// The output of a pack, of which a mask leaves the elements whose bit of `left` is set. Bit e of passed becomes whether
// ReLU passes element e.
template <bool WIDE, class Channels>
DEVICE raw_t normalize(const raw_t& x, const raw_t& residual, const Flags& flags, const Channels& channels,
                       unsigned left, unsigned& passed) {
    acc_t in[WIDTH], added[WIDTH];
    typename Arithmetic<WIDE>::type y[WIDTH];
    unpack(x, in);
    if (flags.residual) unpack(residual, added);
    passed = 0;
#pragma unroll
    for (int e = 0; e < WIDTH; e++) {
        if (WIDE && channels.is_wide(e)) {
            double value = affine<double>(in[e], channels.wide(e));
            if (flags.residual) value += (double)added[e];
            y[e] = value;
        } else {
            acc_t value = affine(in[e], channels.usual(e));
            if (flags.residual) value += added[e];
            y[e] = value;
        }
        if (!(left >> e & 1)) y[e] = 0;
        passed |= (unsigned)(y[e] > 0) << e;
        if (flags.relu) y[e] = y[e] > 0 || y[e] != y[e] ? y[e] : 0;  // NaN passes
    }
    return pack(y);
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward

// How the way back knows what ReLU passed. OPEN: there was no ReLU; INPUT: by the sign of the output, worked out once
// more from the input; RECORD: by the record that the way forward has left.
enum Gate { OPEN, INPUT, RECORD };

DEVICE Gate gate_of(const Epilogue& epilogue) {
    return epilogue.activation == NONE ? OPEN : epilogue.passed ? RECORD : INPUT;
}

// Calls body with the gate of an epilogue, which the compiler knows.
template <class Body>
DEVICE void with_gate(const Epilogue& epilogue, Body body) {
    const Gate gate = gate_of(epilogue);
    if (gate == OPEN)
        body(Known<Gate, OPEN>());
    else if (gate == INPUT)
        body(Known<Gate, INPUT>());
    else
        body(Known<Gate, RECORD>());
}

// Whether ReLU passed element e of a pack, whose value in the input is x. bits are the pack's bits of the record.
template <bool WIDE, class Channels>
DEVICE bool passes(acc_t x, int e, Gate gate, unsigned bits, const Channels& channels) {
    if (gate == OPEN) return true;
    if (gate == RECORD) return bits >> e & 1;
    const bool wide = WIDE && channels.gate_is_wide(e);
    return wide ? affine<double>(x, channels.wide(e)) > 0 : affine(x, channels.usual(e)) > 0;
}

// Sets dy to 0 where ReLU stopped it: what the residual gets. It is never 0 * dy, as dy may be inf. bits are the pack's
// bits of the record.
template <bool WIDE, class Channels>
DEVICE void stop(acc_t (&dy)[WIDTH], const acc_t (&x)[WIDTH], Gate gate, unsigned bits, const Channels& channels) {
    if (gate == OPEN) return;
#pragma unroll
    for (int e = 0; e < WIDTH; e++)
        if (!passes<WIDE>(x[e], e, gate, bits, channels)) dy[e] = 0;
}

// How the statistics depend on x, and so what the input's gradient is. CONSTANTS: not at all. OF_CHANNEL: they are those
// of the element's channel. OF_ROW: those of a row of channels, each with a weight of its own.
enum Dependence { CONSTANTS, OF_CHANNEL, OF_ROW };

// The input's gradient of an element.
template <class A>
DEVICE A input_gradient(A dy, A x, const Factors<A>& f, Dependence dependence) {
    if (dependence == CONSTANTS) return dy * f.scale;  // without 0 * x: x may be inf
    if (dependence == OF_ROW) return mul(dy, f.scale) - (mul(x - f.center, f.slope) + f.offset);  // a weight may be 0
    return (dy - mul(x - f.center, f.slope) - f.offset) * f.scale;
}

// The input's gradient of a pack, of which a mask leaves the elements whose bit of `left` is set. g becomes what the
// residual gets.
template <bool WIDE, class Channels>
DEVICE raw_t input_gradient(const raw_t& dy, const raw_t& x, Gate gate, unsigned bits, unsigned left,
                            Dependence dependence, const Channels& channels, acc_t (&g)[WIDTH]) {
    acc_t in[WIDTH];
    typename Arithmetic<WIDE>::type dx[WIDTH];
    unpack(dy, g);
    unpack(x, in);
    stop<WIDE>(g, in, gate, bits, channels);
#pragma unroll
    for (int e = 0; e < WIDTH; e++) {
        if (WIDE && channels.is_wide(e))
            dx[e] = input_gradient<double>(g[e], in[e], channels.wide(e), dependence);
        else
            dx[e] = input_gradient(g[e], in[e], channels.usual(e), dependence);
        if (!(left >> e & 1)) dx[e] = g[e] = 0;
    }
    return pack(dx);
}

// Adds dy to sum(dy) and dy * (x - center) * rstd to sum(dy * (x - center) * rstd) of element e, in the dtype A. rstd
// is given times PRODUCT_SCALE.
template <class A>
DEVICE void add_products(acc_t dy, acc_t x, const Factors<A>& f, A rstd, A& sum_dy, A& sum_dy_xhat) {
    sum_dy += (A)dy;
    sum_dy_xhat += (A)dy * (((A)x - f.center) * rstd);  // dy * (x - center) may be too small
}
