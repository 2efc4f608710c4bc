// Moments: count, mean and sum of squared deviations, which merge.
#include "types.cuh"
#pragma once

struct Moments {
    double count, mean, m2;
};

// The moments of two sets of values together. Chan, Golub and LeVeque (1979).
DEVICE Moments merge(const Moments& a, const Moments& b) {
    const double count = a.count + b.count;
    if (count == 0) return a;
    const double delta = b.mean - a.mean, share = b.count / count;
    return {count, a.mean + delta * share, a.m2 + b.m2 + delta * delta * (a.count * share)};
}

// Whether float32 held the squares: a sum of them, of deviations whose mean is not 0 or whose squares are not.
DEVICE bool held(float m2, float mean) { return (1e-28f < m2 && m2 < 1e36f) || (m2 == 0 && mean == 0); }
DEVICE bool held(double, double) { return true; }

// Whether float32 held a sum.
DEVICE bool held(float sum) { return -1e36f < sum && sum < 1e36f; }
DEVICE bool held(double) { return true; }
