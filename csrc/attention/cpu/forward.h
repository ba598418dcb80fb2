// Forward of one query block:
//
//   O_i = inv_scaling * sum_j keep(i, j) silu(S_ij) v_j,   S_ij = alpha (q_i . k_j + rab_ij) + bias_ij
//
// The block's queries are packed once, transposed [dim_qk, kBlockQ]. For every key tile that the mask does not rule out,
// K and V are packed as rows, then
//   S^T [keys, queries] = K Q^T       by groups of keys; A is read as scalars, B and the result as vectors of query rows
//   P^T = silu(S^T), 0 where masked   in place
//   O [queries, dim_v] += P V         by groups of query rows; A = P^T read along its rows
// so that nothing but the queries is ever transposed. Sums are fp32 (fp64 for fp64); inv_scaling is applied at the end.
#pragma once

#include "attention/cpu/relative.h"

namespace hstu::attention::cpu::HSTU_CPU_VARIANT {

template <class C>
struct ForwardScratch {
    QueryPanel<C> q;
    KeyPanel<C> k, v;
    QueryPanel<C> rab;
    RelativePanel<C> relative;
    C* scores;  // [kBlockK, kBlockQ]
    C* out;     // [kBlockQ, padded(dim_v)]

    ForwardScratch(Arena& arena, const Params& p)
        : q(arena, p.dim_qk), k(arena, p.dim_qk), v(arena, p.dim_v), rab(arena, p.rab.data ? kBlockK : 0),
          relative(arena, p), scores(arena.take<C>(kBlockK * kBlockQ)),
          out(arena.take<C>(int64_t{kBlockQ} * v.stride())) {}
};

// The rab values of a tile, transposed as the scores are.
template <class T, class C>
static void pack_rab(const RabBias<T>& rab, const Tile& tile, QueryPanel<C>& panel) {
    panel.dim = tile.cols;
    panel.pack(rab.data + (tile.row0 + rab.offset) * rab.row_stride + tile.col0, rab.row_stride, tile.rows);
}

// A range of query rows in whole vectors.
struct VectorSpan {
    int begin, end;
};

template <class C>
HSTU_CPU_INLINE VectorSpan vectors_of(const Span& rows) {
    return {rows.begin / kLanes<C>, (rows.end + kLanes<C> - 1) / kLanes<C>};
}

// Zeros in one key's row of a score tile outside of the vectors that were computed.
template <class C>
HSTU_CPU_INLINE void clear_outside(C* row, VectorSpan computed) {
    for (int v = 0; v < computed.begin; ++v) store(row + v * kLanes<C>, Vector<C>{});
    for (int v = computed.end; v < kBlockQ / kLanes<C>; ++v) store(row + v * kLanes<C>, Vector<C>{});
}

// One key's row of a tile: q.k becomes silu(alpha (q.k + rab) + bias), 0 where masked. rab and bias may be nullptr.
template <class C>
static void activate(const Tile& tile, int key, VectorSpan span, C alpha, const C* rab, const C* bias, C* scores) {
    clear_outside(scores, span);
    for (int v = span.begin; v < span.end; ++v) {
        const int row = v * kLanes<C>;
        Vector<C> s = load(scores + row);
        if (rab != nullptr) s += load(rab + row);
        s *= alpha;
        if (bias != nullptr) s += load(bias + row);
        Vector<C> p = s * sigmoid<C>(s);
        if (!tile.full) p = lanes_of<C>(tile.queries[key] >> row) ? p : Vector<C>{};
        store(scores + row, p);
    }
}

template <class C>
static void forward_tile(const Tile& tile, C alpha, const ForwardScratch<C>& s) {
    for (int g = 0, key = 0; key < tile.cols; ++g, key += kGroup) {
        const int keys = min_of(kGroup, tile.cols - key);
        const VectorSpan span = vectors_of<C>(tile.group_queries[g]);
        C* scores = s.scores + key * kBlockQ;
        const int first = span.begin * kLanes<C>;
        multiply<Layout::kRowMajor, C>(keys, span.end - span.begin, s.q.dim,
                                       {s.k.rows + key * s.k.stride(), s.k.stride()}, {s.q.transposed + first, kBlockQ},
                                       {scores + first, kBlockQ}, false);
        for (int i = 0; i < keys; ++i)
            activate<C>(tile, key + i, span, alpha, s.rab.dim ? s.rab.transposed + (key + i) * kBlockQ : nullptr,
                        s.relative.row(key + i), scores + i * kBlockQ);
    }
    const int width = s.v.stride();
    for (int g = 0, row = 0; row < tile.rows; ++g, row += kGroup) {
        const Span& keys = tile.group_keys[g];
        multiply<Layout::kTransposed, C>(min_of(kGroup, tile.rows - row), width / kLanes<C>, keys.size(),
                                         {s.scores + keys.begin * kBlockQ + row, kBlockQ},
                                         {s.v.rows + keys.begin * width, width}, {s.out + row * width, width}, true);
    }
}

template <class T, class Mask>
static void forward_block(const Params& p, int batch, int head, int block, void* memory) {
    using C = Compute<T>;
    const Sequence sequence(p, batch);
    const Mask mask(p, sequence, batch, head);
    Arena arena(memory);
    ForwardScratch<C> s(arena, p);

    const int row0 = block * kBlockQ, rows = min_of(kBlockQ, sequence.len_q - row0);
    s.q.pack(p.q.at<const T>(sequence.q_begin + row0, head), p.q.row_stride, rows);
    fill_zero(s.out, int64_t{rows} * s.v.stride());
    for_each_tile(mask, row0, rows, [&](const Tile& tile) {
        s.k.pack(p.k.at<const T>(sequence.k_begin + tile.col0, head), p.k.row_stride, tile.cols);
        s.v.pack(p.v.at<const T>(sequence.k_begin + tile.col0, head), p.v.row_stride, tile.cols);
        if (p.rab.data != nullptr) pack_rab(RabBias<T>(p, sequence, batch, head), tile, s.rab);
        if (p.relative) pack_relative(RelativeBias<C>(p, sequence, batch, head), tile, s.relative);
        forward_tile<C>(tile, static_cast<C>(p.alpha_fp64), s);
    });
    write_rows(s.out, s.v.stride(), rows, p.dim_v, static_cast<C>(p.inv_scaling_fp64),
               p.out.at<T>(sequence.q_begin + row0, head), p.out.row_stride);
}

}  // namespace hstu::attention::cpu::HSTU_CPU_VARIANT
