// Channels last, of second order: packs of half the host's width where these have 8 elements. What a thread has to know
// of the channels of so many, and their sums, find no room in its registers.
//
// A thread takes a half of each of the host's packs, its neighbour the other one: tiles cover the same channels, in twice
// as many columns. This file stands in front of all others.
#pragma once
#if WIDTH == 8
#undef WIDTH
#define WIDTH 4
#define RECORDED 8
#endif
#include "../double_backward.cuh"
#include "columns.cuh"

// The host's sizes, as they are for these packs.
DEVICE ChannelsLast halved(const ChannelsLast& sizes) {
    return {sizes.M, sizes.C, sizes.tile * (RECORDED / WIDTH), sizes.rows};
}
