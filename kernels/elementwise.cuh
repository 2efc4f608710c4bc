// What is done to each element, whatever its place in memory.
//
// Every operation is rounded by itself, as NumPy does it: the same statistics give the same bits, and the pass that
// goes back sees the very value whose sign ReLU saw.
//
// Where all elements of a pack are of one channel, its factors are given, in the dtype of the arithmetic or in float64.
// Else `Channels` is a type that knows those of each element: any_wide, is_wide(e), and the factors of element e in the
// dtype of the arithmetic, usual(e), and in float64, wide(e).
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

// (x - center) * scale + shift: without a residual the value whose sign decides what ReLU passes.
template <class A>
DEVICE A affine(A x, const Factors<A>& f) {
    return mul(x - f.center, f.scale) + f.shift;
}

// The output. Bit e of mask tells whether ReLU passes.
template <class A>
DEVICE A output(A x, const Factors<A>& f, const Residual& residual, bool relu, int e, unsigned& mask) {
    A y = affine(x, f);
    if (residual.given) y += (A)element(residual.raw, e);
    mask |= (unsigned)(y > 0) << e;
    return !relu || y > 0 || y != y ? y : 0;  // NaN passes
}

// mask, if it is given, gets where ReLU passes: at the address that belongs to the pack.
template <class A>
DEVICE raw_t normalize(const raw_t& x, const Residual& residual, bool relu, const Factors<A>& f, mask_t* mask) {
    A y[WIDTH];
    unsigned bits = 0;
#pragma unroll
    for (int e = 0; e < WIDTH; e++) y[e] = output<A>(element(x, e), f, residual, relu, e, bits);
    if (mask) *mask = (mask_t)bits;
    return pack(y);
}

template <class Channels>
DEVICE raw_t normalize(const raw_t& x, const Residual& residual, bool relu, const Channels& channels, mask_t* mask) {
    raw_t y;
    unsigned bits = 0;
    if (!channels.any_wide) {
        acc_t values[WIDTH];
#pragma unroll
        for (int e = 0; e < WIDTH; e++) values[e] = output(element(x, e), channels.usual(e), residual, relu, e, bits);
        y = pack(values);
    } else {
        double values[WIDTH];
#pragma unroll
        for (int e = 0; e < WIDTH; e++)
            values[e] = channels.is_wide(e)
                            ? output<double>(element(x, e), channels.wide(e), residual, relu, e, bits)
                            : output(element(x, e), channels.usual(e), residual, relu, e, bits);
        y = pack(values);
    }
    if (mask) *mask = (mask_t)bits;
    return y;
}

// What ReLU passed of a pack, for the way back: as the mask says, or else as the input tells once more.
struct Passed {
    bool recompute;
    unsigned bits;

    DEVICE Passed() {}
    // mask is null, or where the bits of the pack are.
    DEVICE Passed(bool relu, const mask_t* mask) : recompute(relu && !mask), bits(relu && mask ? *mask : ~0u) {}

    template <class A>
    DEVICE bool at(int e, A x, const Factors<A>& f) const {
        return recompute ? affine(x, f) > 0 : bits >> e & 1;
    }
};

// dy, 0 where ReLU stopped it: what the residual gets. Never 0 * dy, which may be inf.
template <class A>
DEVICE raw_t passed_on(const raw_t& dy, const raw_t& x, const Passed& passed, const Factors<A>& f) {
    acc_t g[WIDTH];
#pragma unroll
    for (int e = 0; e < WIDTH; e++) g[e] = passed.at<A>(e, element(x, e), f) ? element(dy, e) : 0;
    return pack(g);
}

template <class Channels>
DEVICE raw_t passed_on(const raw_t& dy, const raw_t& x, const Passed& passed, const Channels& channels) {
    acc_t g[WIDTH];
#pragma unroll
    for (int e = 0; e < WIDTH; e++) {
        const acc_t value = element(x, e);
        const bool passes =
            channels.is_wide(e) ? passed.at<double>(e, value, channels.wide(e)) : passed.at(e, value, channels.usual(e));
        g[e] = passes ? element(dy, e) : 0;
    }
    return pack(g);
}

// The input's gradient. dy becomes that of the residual.
template <class A>
DEVICE A input_gradient(A& dy, A x, const Factors<A>& f, const Passed& passed, bool constant, int e) {
    if (!passed.at(e, x, f)) dy = 0;
    const A dx = constant ? dy : dy - mul(x - f.center, f.slope) - f.offset;  // without 0 * x: x may be inf
    return dx * f.scale;
}

template <class A>
DEVICE raw_t input_gradient(raw_t& dy, const raw_t& x, const Passed& passed, bool constant, const Factors<A>& f) {
    A g[WIDTH], dx[WIDTH];
#pragma unroll
    for (int e = 0; e < WIDTH; e++) {
        g[e] = element(dy, e);
        dx[e] = input_gradient<A>(g[e], element(x, e), f, passed, constant, e);
    }
    dy = pack(g);
    return pack(dx);
}

template <class Channels>
DEVICE raw_t input_gradient(raw_t& dy, const raw_t& x, const Passed& passed, bool constant, const Channels& channels) {
    acc_t g[WIDTH];
#pragma unroll
    for (int e = 0; e < WIDTH; e++) g[e] = element(dy, e);
    if (!channels.any_wide) {
        acc_t dx[WIDTH];
#pragma unroll
        for (int e = 0; e < WIDTH; e++)
            dx[e] = input_gradient(g[e], element(x, e), channels.usual(e), passed, constant, e);
        dy = pack(g);
        return pack(dx);
    }
    double dx[WIDTH];
#pragma unroll
    for (int e = 0; e < WIDTH; e++) {
        if (channels.is_wide(e)) {
            double wide = g[e];
            dx[e] = input_gradient<double>(wide, element(x, e), channels.wide(e), passed, constant, e);
            g[e] = (acc_t)wide;
        } else {
            dx[e] = input_gradient(g[e], element(x, e), channels.usual(e), passed, constant, e);
        }
    }
    dy = pack(g);
    return pack(dx);
}
