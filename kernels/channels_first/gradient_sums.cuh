// Channels first: sum(dy) and sum(dy * xhat) of a few packs.
#pragma once
#include "rows.cuh"

// Adds sum(dy) and sum(dy * (x - center) * rstd), which is kept scaled, of a chunk, unless the dtype of the arithmetic does
// not hold them.
template <int COUNT, class A>
DEVICE bool add_chunk(const raw_t (&dy)[COUNT], const raw_t (&x)[COUNT], const Slot (&slots)[COUNT],
                      const Passed (&passed)[COUNT], const Factors<A>& f, double (&sums)[2]) {
    const A rstd = f.rstd * PRODUCT_SCALE;
    A sum_dy = 0, sum_dy_xhat = 0;
#pragma unroll
    for (int u = 0; u < COUNT; u++) {
#pragma unroll
        for (int e = 0; e < WIDTH; e++) {
            if (!slots[u].has(e)) continue;
            const A value = element(x[u], e), g = passed[u].at(e, value, f) ? element(dy[u], e) : 0;
            sum_dy += g;
            sum_dy_xhat += g * ((value - f.center) * rstd);  // the product of both may be too small
        }
    }
    if (!held(sum_dy) || !held(sum_dy_xhat)) return false;
    sums[0] += sum_dy;
    sums[1] += sum_dy_xhat;
    return true;
}
