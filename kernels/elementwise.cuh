// What is done to each element, whatever its place in memory.
//
// Every operation is rounded by itself, as NumPy does it: the same statistics give the same bits, and the pass that
// goes back sees the very value whose sign ReLU saw.
//
// `Channels` below is a type that knows the channels of the elements of a pack: any_wide, is_wide(e), and the factors
// of element e in the dtype of the arithmetic, usual(e), and in float64, wide(e).
#pragma once
#include "channel.cuh"
#include "pack.cuh"

template <class A>
struct Factors {
    A center, rstd, scale, shift, slope, offset;

    DEVICE Factors() {}
    DEVICE explicit Factors(const Channel& channel)
        : center((A)channel.center), rstd((A)channel.rstd), scale((A)channel.scale), shift((A)channel.shift),
          slope((A)channel.slope), offset((A)channel.offset) {}
};

DEVICE float mul(float a, float b) { return __fmul_rn(a, b); }  // never part of a fused multiply-add
DEVICE double mul(double a, double b) { return __dmul_rn(a, b); }

// Element e of the residual, which there may not be.
struct Residual {
    bool given;
    raw_t raw;
};

// (x - center) * scale + shift + residual: the value whose sign decides what ReLU passes.
template <class A>
DEVICE A preactivation(A x, const Factors<A>& f, const Residual& residual, int e) {
    const A y = mul(x - f.center, f.scale) + f.shift;
    return residual.given ? y + (A)element(residual.raw, e) : y;
}

template <class A>
DEVICE A output(A x, const Factors<A>& f, const Residual& residual, bool relu, int e) {
    const A y = preactivation(x, f, residual, e);
    return !relu || y > 0 || y != y ? y : 0;  // NaN passes
}

// The input's gradient. dy becomes that of the residual: 0 where ReLU stopped it, never 0 * dy, which may be inf.
template <class A>
DEVICE A input_gradient(A& dy, A x, const Factors<A>& f, const Residual& residual, bool relu, bool constant, int e) {
    if (relu && !(preactivation(x, f, residual, e) > 0)) dy = 0;
    const A dx = constant ? dy : dy - mul(x - f.center, f.slope) - f.offset;  // without 0 * x: x may be inf
    return dx * f.scale;
}

template <class Channels>
DEVICE raw_t normalize(const raw_t& x, const Residual& residual, bool relu, const Channels& channels) {
    if (!channels.any_wide) {
        acc_t y[WIDTH];
#pragma unroll
        for (int e = 0; e < WIDTH; e++) y[e] = output(element(x, e), channels.usual(e), residual, relu, e);
        return pack(y);
    }
    double y[WIDTH];
#pragma unroll
    for (int e = 0; e < WIDTH; e++)
        y[e] = channels.is_wide(e) ? output<double>(element(x, e), channels.wide(e), residual, relu, e)
                                   : output(element(x, e), channels.usual(e), residual, relu, e);
    return pack(y);
}

template <class Channels>
DEVICE raw_t input_gradient(raw_t& dy, const raw_t& x, const Residual& residual, bool relu, bool constant,
                            const Channels& channels) {
    acc_t g[WIDTH];
#pragma unroll
    for (int e = 0; e < WIDTH; e++) g[e] = element(dy, e);
    if (!channels.any_wide) {
        acc_t dx[WIDTH];
#pragma unroll
        for (int e = 0; e < WIDTH; e++)
            dx[e] = input_gradient(g[e], element(x, e), channels.usual(e), residual, relu, constant, e);
        dy = pack(g);
        return pack(dx);
    }
    double dx[WIDTH];
#pragma unroll
    for (int e = 0; e < WIDTH; e++) {
        if (channels.is_wide(e)) {
            double wide = g[e];
            dx[e] = input_gradient<double>(wide, element(x, e), channels.wide(e), residual, relu, constant, e);
            g[e] = (acc_t)wide;
        } else {
            dx[e] = input_gradient(g[e], element(x, e), channels.usual(e), residual, relu, constant, e);
        }
    }
    dy = pack(g);
    return pack(dx);
}
