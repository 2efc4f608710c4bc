// Copies into shared memory that are on their way while the thread goes on.
//
// A thread reads the packs that it has copied itself, and no others: it waits for its own copies, and no barrier is
// needed.
#pragma once
#include "pack.cuh"

// Groups of a thread's copies: it works on the first ones while the others are on their way.
constexpr int GROUPS = 4;

// The dynamic shared memory of the block, where the packs of all its threads lie.
DEVICE raw_t* staging() {
    extern __shared__ __align__(16) unsigned char memory[];
    return reinterpret_cast<raw_t*>(memory);
}

// The address of a place in shared memory, in the form that copies want. Call it outside loops: it takes some
// instructions.
DEVICE unsigned address_of(const raw_t* shared) {
#ifdef __CUDA_ARCH__
    unsigned address;  // opaque: the compiler would work it out again for each copy
    asm volatile("mov.u32 %0, %1;" : "=r"(address) : "r"((unsigned)__cvta_generic_to_shared(shared)));
    return address;
#else
    return 0;
#endif
}

// Whether threads carry packs themselves, by loading and storing them: on GPUs without such copies, and where packs
// have fewer bytes than a copy moves.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool CARRIED = true;
#else
constexpr bool CARRIED = PACK_BYTES < 4;
#endif

// Starts the copy of the pack at p to shared[i]; `address` is address_of(shared).
DEVICE void copy(raw_t* shared, unsigned address, int i, const data_t* p) {
#ifndef __CUDA_ARCH__
    __pipeline_memcpy_async(shared + i, p, PACK_BYTES);  // CUDA's name for it; its header takes a second to compile
#elif __CUDA_ARCH__ >= 800
    const unsigned to = address + i * PACK_BYTES;
    if (PACK_BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(p) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;"
                     :
                     : "r"(to), "l"(p), "n"(PACK_BYTES % 16 ? PACK_BYTES : 4)
                     : "memory");
#endif
}

// Ends a group of this thread's copies: those that it has started since the last group.
DEVICE void end_group() {
#if !defined(__CUDA_ARCH__)
    __pipeline_commit();
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until all groups of this thread's copies have arrived but the last LEFT.
template <int LEFT>
DEVICE void wait_but() {
#if !defined(__CUDA_ARCH__)
    __pipeline_wait_prior(LEFT);
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
#endif
}

// Waits until the first `groups` of GROUPS groups have arrived.
DEVICE void wait_for(int groups) {
    static_assert(GROUPS == 4, "a case for each");
    if (groups >= 4)
        wait_but<0>();
    else if (groups >= 3)
        wait_but<1>();
    else if (groups >= 2)
        wait_but<2>();
    else
        wait_but<3>();
}
