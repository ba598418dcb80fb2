// In the place of csrc/attention/sm90/product.h: products happen when they are committed or, with `late`, when the wait
// needs them; they read their operands then.
#pragma once

#include "attention/gpu.h"
#include "attention/sm90/pipeline.h"

namespace hstu::attention::sm90 {

template <int kCols_>
struct Accumulator {
    static constexpr int kCols = kCols_, kSize = kCols / 2;
    float x[kSize];

    void clear() { std::fill(x, x + kSize, 0.0f); }
    static int row() { return (threadIdx.x / 32 % 4) * 16 + lane() / 4; }
    static int col() { return lane() % 4 * 2; }
};

template <int kSteps_>
struct Fragments {
    static constexpr int kSteps = kSteps_;
    uint32_t x[kSteps][4];
};

template <class T, int kCols>
void convert_step(Fragments<kCols / 16>& out, const Accumulator<kCols>& acc, int step) {
    for (int i = 0; i < 4; ++i) out.x[step][i] = pack<T>(acc.x[step * 8 + 2 * i], acc.x[step * 8 + 2 * i + 1]);
}

inline void write_blocks(uint32_t to, const uint32_t (&blocks)[4]) {
    const int self = lane();
    for (int i = 0; i < 4; ++i) {
        // This lane's word of block i goes to row self / 4, whose address lane 8 i + self / 4 has.
        const uint32_t row = __shfl_sync(~0u, to, 8 * i + self / 4);
        if (row % 16 != 0) emulated::fail("a block's row that is not aligned");
        std::memcpy(emulated::shared_window + row + self % 4 * 4, &blocks[i], 4);
    }
}

inline void read_blocks(uint32_t (&blocks)[4], uint32_t from) {
    const int self = lane();
    for (int i = 0; i < 4; ++i) {
        const uint32_t row = __shfl_sync(~0u, from, 8 * i + self / 4);
        if (row % 16 != 0) emulated::fail("a block's row that is not aligned");
        std::memcpy(&blocks[i], emulated::shared_window + row + self % 4 * 4, 4);
    }
}

template <class Tile_, bool kColumns>
struct SharedOperand {
    using Tile = Tile_;
    Tile tile;
    int first;

    // Element `index` along m or n, `k` along k.
    float at(int index, int k) const {
        const int row = kColumns ? k : first + index, col = kColumns ? first + index : k;
        bf16 value;
        std::memcpy(&value,
                    emulated::shared_window + tile.address + col / Tile::kPanelCols * Tile::kPanelBytes +
                        Tile::chunk_offset(row, col % Tile::kPanelCols) + col % 8 * 2,
                    2);
        return static_cast<float>(value);
    }
};
template <class Tile>
SharedOperand<Tile, false> rows(Tile tile, int first = 0) {
    return {tile, first};
}
template <class Tile>
SharedOperand<Tile, true> columns(Tile tile, int first = 0) {
    return {tile, first};
}

inline void run_products(std::vector<std::function<void()>>& group) {
    for (const auto& product : group) product();
}

inline void begin_products() {}
inline void commit_products() {
    emulated::Fiber& f = emulated::fiber();
    if (!emulated::late) run_products(f.products);
    f.product_groups.push_back(emulated::late ? std::move(f.products) : std::vector<std::function<void()>>{});
    f.products.clear();
}
template <int kPending>
void wait_products() {
    auto& groups = emulated::fiber().product_groups;
    while (groups.size() > kPending) {
        run_products(groups.front());
        groups.erase(groups.begin());
    }
}
template <class Registers>
void hold(Registers&) {}

template <int kCols, int kSteps, class B>
void add_product(Accumulator<kCols>& acc, const float (&left)[2][16 * kSteps], const B& b, bool replace,
                 int first = 0) {
    for (int i = 0; i < kCols / 2; ++i) {
        const int col = i / 4 * 8 + lane() % 4 * 2 + i % 2;
        float sum = replace ? 0.0f : acc.x[i];
        for (int k = 0; k < 16 * kSteps; ++k) sum += left[i / 2 % 2][k] * b.at(col, first + k);
        acc.x[i] = sum;
    }
}

template <class T, int kSteps, bool kReplace = false, int kCols, class Tile, bool kColumns, class B>
void multiply(Accumulator<kCols>& acc, const SharedOperand<Tile, kColumns>& a, const B& b) {
    emulated::fiber().products.push_back([&acc, a, b] {
        float left[2][16 * kSteps];
        for (int half = 0; half < 2; ++half)
            for (int k = 0; k < 16 * kSteps; ++k) left[half][k] = a.at(Accumulator<kCols>::row() + 8 * half, k);
        add_product<kCols, kSteps>(acc, left, b, kReplace);
    });
}
template <class T, int kSteps, bool kReplace = false, int kCols, int kFragments, class B>
void multiply(Accumulator<kCols>& acc, const Fragments<kFragments>& a, const B& b, int first = 0) {
    emulated::fiber().products.push_back([&acc, &a, b, first] {
        emulated::Warp& warp = emulated::warp();
        warp.pointers[lane()] = &a.x[0][0];
        emulated::sync_warp();
        float left[2][16 * kSteps];
        for (int half = 0; half < 2; ++half)
            for (int k = 0; k < 16 * kSteps; ++k) {
                const uint32_t* from = warp.pointers[lane() / 4 * 4 + k % 8 / 2];
                const uint32_t word = from[(first + k) / 16 * 4 + k % 16 / 8 * 2 + half];
                __nv_bfloat16 value;
                value.bits = static_cast<uint16_t>(k % 2 ? word >> 16 : word);
                left[half][k] = static_cast<float>(value);
            }
        emulated::sync_warp();
        add_product<kCols, kSteps>(acc, left, b, kReplace, first);
    });
}
template <class T, int kCols, int kFragments, class B>
void multiply_step(Accumulator<kCols>& acc, const Fragments<kFragments>& a, const B& b, int step) {
    multiply<T, 1>(acc, a, b, 16 * step);
}

}  // namespace hstu::attention::sm90
