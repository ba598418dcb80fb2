// Rows of a tensor brought into scratch: converted, side by side, padded with zeros to whole vectors.
#pragma once

#include "attention/cpu/convert.h"
#include "attention/cpu/gemm.h"
#include "attention/cpu/kernels.h"

namespace hstu::attention::cpu::HSTU_CPU_VARIANT {

// Hands out parts of one aligned block. Made with nullptr it only counts.
class Arena {
  public:
    explicit Arena(void* begin) : begin_(static_cast<char*>(begin)) {}

    template <class C>
    C* take(int64_t count) {
        C* part = begin_ == nullptr ? nullptr : reinterpret_cast<C*>(begin_ + used_);
        used_ += (static_cast<size_t>(count) * sizeof(C) + 63) / 64 * 64;
        return part;
    }
    size_t used() const { return used_; }

  private:
    char* begin_;
    size_t used_ = 0;
};

template <class C>
static void fill_zero(C* to, int64_t count) {
    std::memset(to, 0, static_cast<size_t>(count) * sizeof(C));
}

// to[row, 0..padded(dim)) = from[row, 0..dim), then zeros.
template <class T, class C>
static void pack_rows(const T* from, int64_t from_stride, int rows, int dim, C* to) {
    const int whole = dim / 8 * 8, width = padded<C>(dim);
    for (int row = 0; row < rows; ++row, from += from_stride, to += width) {
        for (int d = 0; d < whole; d += 8) load8(from + d, to + d);
        if (whole == width) continue;
        fill_zero(to + whole, width - whole);
        if (whole == dim) continue;
        T rest[8] = {};
        std::memcpy(rest, from + whole, (dim - whole) * sizeof(T));
        load8(rest, to + whole);
    }
}

// to[0..8) = scale * from[0..8)
template <class T, class C>
HSTU_CPU_INLINE void store8_scaled(const C* from, C scale, T* to) {
    C scaled[8];
    for (int i = 0; i < 8; ++i) scaled[i] = from[i] * scale;
    store8(scaled, to);
}

// to[row, 0..dim) = scale * from[row, 0..dim); from is readable up to padded(dim).
template <class T, class C>
static void write_rows(const C* from, int from_stride, int rows, int dim, C scale, T* to, int64_t to_stride) {
    const int whole = dim / 8 * 8;
    for (int row = 0; row < rows; ++row, from += from_stride, to += to_stride) {
        for (int d = 0; d < whole; d += 8) store8_scaled(from + d, scale, to + d);
        if (whole == dim) continue;
        T rest[8];
        store8_scaled(from + whole, scale, rest);
        std::memcpy(to + whole, rest, (dim - whole) * sizeof(T));
    }
}

// to[col, row] = from[row, col] of 8 x 8 elements.
template <class C>
HSTU_CPU_INLINE void transpose8(const C* from, int from_stride, C* to, int to_stride) {
#if defined(__AVX2__)
    if constexpr (sizeof(C) == sizeof(float)) {
        __m256 row[8], pair[8], quad[8];
        for (int i = 0; i < 8; ++i) row[i] = _mm256_loadu_ps(from + i * from_stride);
        for (int i = 0; i < 8; i += 2) {
            pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
            pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
        }
        for (int i = 0; i < 8; i += 4) {
            quad[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
            quad[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee);
            quad[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
            quad[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
        }
        for (int i = 0; i < 4; ++i) {
            _mm256_storeu_ps(to + i * to_stride, _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x20));
            _mm256_storeu_ps(to + (i + 4) * to_stride, _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x31));
        }
        return;
    }
#endif
    for (int i = 0; i < 8; ++i)
        for (int j = 0; j < 8; ++j) to[j * to_stride + i] = from[i * from_stride + j];
}

// to[col, row] = from[row, col]; rows and cols are multiples of eight.
template <class C>
static void transpose(const C* from, int from_stride, int rows, int cols, C* to, int to_stride) {
    for (int col = 0; col < cols; col += 8)
        for (int row = 0; row < rows; row += 8)
            transpose8(from + row * from_stride + col, from_stride, to + col * to_stride + row, to_stride);
}

// The rows of one query block, as they are [kBlockQ, padded(dim)] and transposed [padded(dim), kBlockQ], with zeros after
// the last row.
template <class C>
struct QueryPanel {
    C* rows;
    C* transposed;
    int dim;

    QueryPanel(Arena& arena, int dim)
        : rows(arena.take<C>(int64_t{kBlockQ} * padded<C>(dim))),
          transposed(arena.take<C>(int64_t{kBlockQ} * padded<C>(dim))), dim(dim) {}

    int stride() const { return padded<C>(dim); }

    template <class T>
    void pack(const T* from, int64_t from_stride, int count) {
        const int whole = padded<C>(count);
        pack_rows(from, from_stride, count, dim, rows);
        fill_zero(rows + count * stride(), int64_t{whole - count} * stride());
        transpose(rows, stride(), whole, stride(), transposed, kBlockQ);
    }
};

// The rows of one key tile [kBlockK, padded(dim)].
template <class C>
struct KeyPanel {
    C* rows;
    int dim;

    KeyPanel(Arena& arena, int dim) : rows(arena.take<C>(int64_t{kBlockK} * padded<C>(dim))), dim(dim) {}

    int stride() const { return padded<C>(dim); }

    template <class T>
    void pack(const T* from, int64_t from_stride, int count) {
        pack_rows(from, from_stride, count, dim, rows);
    }
};

}  // namespace hstu::attention::cpu::HSTU_CPU_VARIANT
