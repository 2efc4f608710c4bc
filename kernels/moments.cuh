// Moments: count, mean and sum of squared deviations, which merge.
#pragma once
#include "types.cuh"

struct Moments {
    double count, mean, m2;
};

// The moments of two sets of values together; share = b.count / (a.count + b.count). Chan, Golub and LeVeque (1979).
DEVICE Moments merge(const Moments& a, const Moments& b, double share) {
    const double delta = b.mean - a.mean;
    return {a.count + b.count, a.mean + delta * share, a.m2 + b.m2 + delta * (delta * (a.count * share))};
}
DEVICE Moments merge(const Moments& a, const Moments& b) {
    const double count = a.count + b.count;
    return count == 0 ? a : merge(a, b, b.count / count);
}

// The moments part(0) to part(PARTS - 1) together, with one division. Exact, if all means are that of the first part.
template <int PARTS, class Part>
DEVICE Moments merge_all(Part part) {
    if (PARTS == 1) return part(0);
    const double pivot = part(0).mean;
    double count = 0, offset = 0, m2 = 0;
#pragma unroll 1  // rarely run, and not worth the registers
    for (int p = 0; p < PARTS; p++) {
        count += part(p).count;
        if (part(p).count > 0) offset += part(p).count * (part(p).mean - pivot);
    }
    if (count == 0) return {0, 0, 0};
    const double mean = pivot + offset / count;
#pragma unroll 1
    for (int p = 0; p < PARTS; p++) {
        const double delta = part(p).mean - mean;
        if (part(p).count > 0) m2 += part(p).m2 + part(p).count * delta * delta;
    }
    return {count, mean, m2};
}

// The sum of N values, added pair by pair: few roundings for each.
template <int N, class A>
DEVICE A sum_pairs(const A (&values)[N]) {
    static_assert((N & (N - 1)) == 0, "a power of two");
    A sums[N];
#pragma unroll
    for (int i = 0; i < N; i++) sums[i] = values[i];
#pragma unroll
    for (int half = N / 2; half > 0; half /= 2)
#pragma unroll
        for (int i = 0; i < half; i++) sums[i] += sums[i + half];
    return sums[0];
}

// 1 / count, which rarely differs from 1 / FULL: divisions in float64 are slow.
template <int FULL>
DEVICE double inverse(int count) {
    return count == FULL ? 1.0 / FULL : 1.0 / count;
}

// The moments of values, from sums about pivot + offset: sum_d of deviations, sum_dd of their squares.
DEVICE Moments from_sums(int count, double inv_count, double pivot, double offset, double sum_d, double sum_dd) {
    const double m2 = sum_dd - sum_d * sum_d * inv_count;
    return {(double)count, pivot + (offset + sum_d * inv_count), m2 < 0 ? 0 : m2};
}

// Whether the dtype A held the squares of deviations. 0 may be the sum of squares that it lost.
template <class A>
DEVICE bool held_squares(double m2) {
    return sizeof(A) == 8 || (1e-28 < m2 && m2 < 1e36);
}

// Sums of dy * xhat are kept times this power of two: float32 loses fewer of the small products, and where it does not hold
// large ones, float64 takes over.
constexpr float PRODUCT_SCALE = 0x1p32f;
DEVICE double unscaled(double sum) { return sum * 0x1p-32; }

// Whether float32 held a sum.
DEVICE bool held(float sum) { return -1e36f < sum && sum < 1e36f; }
DEVICE bool held(double) { return true; }
