// Norm of one row, that is of what shares one mean and one variance: what depends on the row alone, and what is done to
// each of its elements.
//
// xhat = (x - mean) * rstd is computed as (x - center) * rstd + lost: center is the mean rounded to the dtype of the
// arithmetic, and lost what the rounding took away, times -rstd. If not CENTERED, as in RMS norm, it is x * rstd.
// Mirror: numpy_norms._Rows
#pragma once
#include "elementwise.cuh"

#ifndef CENTERED
#define CENTERED 1
#endif

// The numbers of a row in the dtype A.
template <class A>
struct RowFactors {
    A center, rstd, lost;
    A mean_g, mean_g_xhat;  // means of weight * dy and of weight * dy * xhat over the row, on the way back

    // (x - mean) * rstd.
    DEVICE A xhat(A x) const { return CENTERED ? multiply_add(x - center, rstd, lost) : mul(x, rstd); }
    // The input's gradient of an element, g being weight * dy.
    DEVICE A input_gradient(A g, A xhat) const {
        return mul(multiply_add(-xhat, mean_g_xhat, CENTERED ? g - mean_g : g), rstd);
    }
};

// Whether a mean is near the limits of float32.
DEVICE bool near_limits(double mean) { return !(fabs(mean) <= 1e30) || (fabs(mean) < 1e-30 && mean != 0); }

// What is known of a row, in float64 and in the dtype of the arithmetic.
struct Row {
    double mean, rstd;         // rstd = 1 / sqrt(var + eps)
    double mean_g, mean_g_xhat;
    RowFactors<acc_t> usual;
    bool wide;                 // whether float32 is too narrow: all is done in float64 then
    bool exact_gradients;      // whether it is too narrow for the way back

    // Notes the means that the way back needs.
    DEVICE void set_means(const double (&means)[2]) {
        mean_g = means[0];
        mean_g_xhat = means[1];
        usual.mean_g = (acc_t)mean_g;
        usual.mean_g_xhat = (acc_t)mean_g_xhat;
        exact_gradients = wide || (sizeof(acc_t) < 8 && ((CENTERED && near_limits(mean_g)) || near_limits(mean_g_xhat)));
    }
    DEVICE RowFactors<double> exact() const { return {mean, rstd, 0, mean_g, mean_g_xhat}; }
};

// The row of this mean and variance.
DEVICE Row make_row(double mean, double var, double eps) {
    Row row;
    row.mean = mean;
    row.rstd = 1 / sqrt(var + eps);
    const acc_t center = (acc_t)mean;
    const double rest = mean - center;
    const bool lost = rest - rest == 0 && rest != 0;  // else inf - inf, or 0 * inf, would be NaN
    row.usual = {center, (acc_t)row.rstd, lost ? (acc_t)__dmul_rn(-rest, row.rstd) : 0, 0, 0};
    row.mean_g = row.mean_g_xhat = 0;
    row.wide = sizeof(acc_t) < 8 && (row.rstd < 1e-15 || row.rstd > 1e15 || fabs(mean) > 1e30);
    return row;
}
