// Packs: the elements that one load or store moves, 16 bytes of them where memory is aligned and one element where not.
#pragma once
#include "types.cuh"

#if VECTORIZED
constexpr int WIDTH = 16 / sizeof(data_t);    // elements of a pack
typedef uint4 raw_t;                          // as they lie in memory
#else
constexpr int WIDTH = 1;
typedef data_t raw_t;
#endif
typedef unsigned char mask_t;                 // a bit for each element of a pack

#if VECTORIZED

struct Words {
    unsigned w[4];
    DEVICE Words() : w{0, 0, 0, 0} {}
    DEVICE Words(const uint4& raw) : w{raw.x, raw.y, raw.z, raw.w} {}
    DEVICE uint4 raw() const { return make_uint4(w[0], w[1], w[2], w[3]); }

    // e is a constant once the loops around are unrolled: the words stay in registers.
    DEVICE void get(int e, float& x) const { x = __uint_as_float(w[e]); }
    DEVICE void get(int e, double& x) const { x = __hiloint2double((int)w[2 * e + 1], (int)w[2 * e]); }
    template <class T>
    DEVICE void get(int e, T& x) const {
        x.bits = (unsigned short)(w[e / 2] >> (e % 2 * 16));
    }
    DEVICE void set(int e, float x) { w[e] = __float_as_uint(x); }
    DEVICE void set(int e, double x) {
        w[2 * e] = (unsigned)__double2loint(x);
        w[2 * e + 1] = (unsigned)__double2hiint(x);
    }
    template <class T>
    DEVICE void set(int e, T x) {  // of a word that is 0 there
        w[e / 2] |= (unsigned)x.bits << (e % 2 * 16);
    }
};

// Element e of a pack.
DEVICE acc_t element(const raw_t& raw, int e) {
    data_t x;
    Words(raw).get(e, x);
    return widen(x);
}

template <class A>
DEVICE raw_t pack(const A (&values)[WIDTH]) {
    Words words;
#pragma unroll
    for (int e = 0; e < WIDTH; e++) {
        data_t x;
        narrow(values[e], x);
        words.set(e, x);
    }
    return words.raw();
}

// Elements lo to hi - 1 of the pack at p, one by one; zeros elsewhere.
DEVICE raw_t load_elements(const data_t* p, int lo, int hi) {
    Words words;
#pragma unroll
    for (int e = 0; e < WIDTH; e++)
        if (lo <= e && e < hi) words.set(e, p[e]);
    return words.raw();
}
DEVICE void store_elements(data_t* p, const raw_t& raw, int lo, int hi) {
    const Words words(raw);
#pragma unroll
    for (int e = 0; e < WIDTH; e++)
        if (lo <= e && e < hi) words.get(e, p[e]);
}

#else

DEVICE acc_t element(const raw_t& raw, int) { return widen(raw); }
template <class A>
DEVICE raw_t pack(const A (&values)[WIDTH]) {
    raw_t x;
    narrow(values[0], x);
    return x;
}
DEVICE raw_t load_elements(const data_t*, int, int) { return raw_t(); }  // none: a pack is not cut
DEVICE void store_elements(data_t*, const raw_t&, int, int) {}

#endif

// The whole pack at p.
DEVICE raw_t load(const data_t* p) { return *reinterpret_cast<const raw_t*>(p); }
DEVICE void store(data_t* p, const raw_t& raw) { *reinterpret_cast<raw_t*>(p) = raw; }
