// Packs: the WIDTH neighbouring elements that one load or store moves.
//
// They are 16 bytes where rows and memory allow it, 8, 4 or a single element where they do not: a pack never has
// elements of two rows.
#pragma once
#include "types.cuh"

constexpr int PACK_BYTES = WIDTH * sizeof(data_t);

// The type by which so many bytes are moved.
template <int BYTES>
struct Raw;
template <>
struct Raw<16> {
    typedef uint4 type;
};
template <>
struct Raw<8> {
    typedef uint2 type;
};
template <>
struct Raw<4> {
    typedef unsigned type;
};
template <>
struct Raw<2> {
    typedef unsigned short type;
};
typedef Raw<PACK_BYTES>::type raw_t;          // a pack as it lies in memory
typedef unsigned char passed_t;               // the byte of a pack in a record of ReLU: a bit for each element

// A pack as 32-bit words, which stay in registers: indices are constants once loops are unrolled.
struct Words {
    unsigned w[(PACK_BYTES + 3) / 4];

    DEVICE Words() {}
    DEVICE explicit Words(const raw_t& raw) { split(raw, w); }
    DEVICE raw_t raw() const {
        raw_t result;
        join(w, result);
        return result;
    }

  private:
    DEVICE static void split(const uint4& raw, unsigned* w) { w[0] = raw.x, w[1] = raw.y, w[2] = raw.z, w[3] = raw.w; }
    DEVICE static void split(const uint2& raw, unsigned* w) { w[0] = raw.x, w[1] = raw.y; }
    DEVICE static void split(unsigned raw, unsigned* w) { w[0] = raw; }
    DEVICE static void split(unsigned short raw, unsigned* w) { w[0] = raw; }
    DEVICE static void join(const unsigned* w, uint4& raw) { raw = make_uint4(w[0], w[1], w[2], w[3]); }
    DEVICE static void join(const unsigned* w, uint2& raw) { raw = make_uint2(w[0], w[1]); }
    DEVICE static void join(const unsigned* w, unsigned& raw) { raw = w[0]; }
    DEVICE static void join(const unsigned* w, unsigned short& raw) { raw = (unsigned short)w[0]; }
};

// Reads and writes element e among 32-bit words. T is the dtype; this one is for those of two bytes.
template <class T>
struct Elements {
    DEVICE static T get(const unsigned* w, int e) {
        T x;
        x.bits = (unsigned short)(w[e / 2] >> (e % 2 * 16));
        return x;
    }
    template <class A>
    DEVICE static void set(unsigned* w, const A (&x)[WIDTH]) {
#pragma unroll
        for (int e = 0; e + 1 < WIDTH; e += 2) w[e / 2] = narrow_pair<T>(x[e], x[e + 1]);
        if (WIDTH % 2 == 1) {
            T last;
            narrow(x[WIDTH - 1], last);
            w[WIDTH / 2] = last.bits;
        }
    }
};
template <>
struct Elements<float> {
    DEVICE static float get(const unsigned* w, int e) { return __uint_as_float(w[e]); }
    template <class A>
    DEVICE static void set(unsigned* w, const A (&x)[WIDTH]) {
#pragma unroll
        for (int e = 0; e < WIDTH; e++) w[e] = __float_as_uint((float)x[e]);
    }
};
template <>
struct Elements<double> {
    DEVICE static double get(const unsigned* w, int e) { return __hiloint2double((int)w[2 * e + 1], (int)w[2 * e]); }
    DEVICE static void set(unsigned* w, const double (&x)[WIDTH]) {
#pragma unroll
        for (int e = 0; e < WIDTH; e++) {
            w[2 * e] = (unsigned)__double2loint(x[e]);
            w[2 * e + 1] = (unsigned)__double2hiint(x[e]);
        }
    }
};

// All elements of a pack, in the dtype of the arithmetic.
DEVICE void unpack(const raw_t& raw, acc_t (&x)[WIDTH]) {
    const Words words(raw);
#pragma unroll
    for (int e = 0; e < WIDTH; e++) x[e] = widen(Elements<data_t>::get(words.w, e));
}

// The pack that has these elements, each rounded to the nearest.
template <class A>
DEVICE raw_t pack(const A (&x)[WIDTH]) {
    Words words;
    Elements<data_t>::set(words.w, x);
    return words.raw();
}

// Load and store of the pack whose first element is *p.
DEVICE raw_t load(const data_t* p) { return *reinterpret_cast<const raw_t*>(p); }
DEVICE void store(data_t* p, const raw_t& raw) { *reinterpret_cast<raw_t*>(p) = raw; }
