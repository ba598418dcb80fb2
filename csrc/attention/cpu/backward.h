// Backward of some query blocks of one sequence and head; P_ij = keep silu(S_ij), G_ij = keep silu'(S_ij) (dO_i . v_j):
//
//   dV_j = inv_scaling sum_i P_ij dO_i    dK_j = alpha inv_scaling sum_i G_ij q_i    dQ_i = alpha inv_scaling sum_j G_ij k_j
//
// Query blocks outside, key tiles inside. Q and dO are packed once per block, both as rows and transposed; K and V once
// per tile, as rows. By groups of keys:
//   S^T = K Q^T, dP^T = V dO^T, then P^T and G^T in place;  dV += P^T dO;  dK += G^T Q
// and, once the tile is done, by groups of query rows: dQ += G K. dQ belongs to the block. dK and dV are summed over the
// blocks in `partial` ([len_k, padded(dim_qk)] then [len_k, padded(dim_v)]), which belongs to this call alone; finish()
// adds the partials of a sequence in order and scales. So no two threads write one place, and no sum depends on who ran
// first.
#pragma once

#include "attention/cpu/forward.h"

namespace hstu::attention::cpu::HSTU_CPU_VARIANT {

template <class C>
struct BackwardScratch {
    QueryPanel<C> q, dout;
    KeyPanel<C> k, v;
    QueryPanel<C> rab;
    RelativePanel<C> relative;
    C* p;   // [kBlockK, kBlockQ]: S^T, then P^T
    C* g;   // [kBlockK, kBlockQ]: dP^T, then G^T
    C* dq;  // [kBlockQ, padded(dim_qk)]

    BackwardScratch(Arena& arena, const Params& params)
        : q(arena, params.dim_qk), dout(arena, params.dim_v), k(arena, params.dim_qk), v(arena, params.dim_v),
          rab(arena, params.rab.data ? kBlockK : 0), relative(arena, params), p(arena.take<C>(kBlockK * kBlockQ)),
          g(arena.take<C>(kBlockK * kBlockQ)), dq(arena.take<C>(int64_t{kBlockQ} * q.stride())) {}
};

template <class C>
struct Partial {
    C* dk;
    C* dv;

    Partial(Arena& arena, const Params& p, int len_k)
        : dk(arena.take<C>(int64_t{len_k} * padded<C>(p.dim_qk))),
          dv(arena.take<C>(int64_t{len_k} * padded<C>(p.dim_v))) {}
};

// One key's row of a tile: (q.k, dO.v) becomes (P, G), 0 where masked. rab and bias may be nullptr.
template <class C>
static void differentiate(const Tile& tile, int key, VectorSpan span, C alpha, const C* rab, const C* bias, C* p,
                          C* g) {
    clear_outside(p, span);
    clear_outside(g, span);
    for (int v = span.begin; v < span.end; ++v) {
        const int row = v * kLanes<C>;
        Vector<C> s = load(p + row);
        if (rab != nullptr) s += load(rab + row);
        s *= alpha;
        if (bias != nullptr) s += load(bias + row);
        const Vector<C> sigma = sigmoid<C>(s);
        Vector<C> silu = s * sigma;
        Vector<C> grad = (sigma + silu * (C(1) - sigma)) * load(g + row);
        if (!tile.full) {
            const BitVector<C> kept = lanes_of<C>(tile.queries[key] >> row);
            silu = kept ? silu : Vector<C>{};
            grad = kept ? grad : Vector<C>{};
        }
        store(p + row, silu);
        store(g + row, grad);
    }
}

template <class C>
static void backward_tile(const Tile& tile, C alpha, const BackwardScratch<C>& s, const Partial<C>& partial) {
    const int width_qk = s.q.stride(), width_v = s.v.stride();
    for (int group = 0, key = 0; key < tile.cols; ++group, key += kGroup) {
        const int keys = min_of(kGroup, tile.cols - key);
        const Span& rows = tile.group_queries[group];
        const VectorSpan span = vectors_of<C>(rows);
        const int first = span.begin * kLanes<C>;
        C *p = s.p + key * kBlockQ, *g = s.g + key * kBlockQ;
        multiply<Layout::kRowMajor, C>(keys, span.end - span.begin, s.q.dim, {s.k.rows + key * width_qk, width_qk},
                                       {s.q.transposed + first, kBlockQ}, {p + first, kBlockQ}, false);
        multiply<Layout::kRowMajor, C>(keys, span.end - span.begin, s.v.dim, {s.v.rows + key * width_v, width_v},
                                       {s.dout.transposed + first, kBlockQ}, {g + first, kBlockQ}, false);
        for (int i = 0; i < keys; ++i)
            differentiate<C>(tile, key + i, span, alpha, s.rab.dim ? s.rab.transposed + (key + i) * kBlockQ : nullptr,
                             s.relative.row(key + i), p + i * kBlockQ, g + i * kBlockQ);
        const int64_t col = tile.col0 + key;
        multiply<Layout::kRowMajor, C>(keys, width_v / kLanes<C>, rows.size(), {p + rows.begin, kBlockQ},
                                       {s.dout.rows + rows.begin * width_v, width_v},
                                       {partial.dv + col * width_v, width_v}, true);
        multiply<Layout::kRowMajor, C>(keys, width_qk / kLanes<C>, rows.size(), {g + rows.begin, kBlockQ},
                                       {s.q.rows + rows.begin * width_qk, width_qk},
                                       {partial.dk + col * width_qk, width_qk}, true);
    }
    for (int group = 0, row = 0; row < tile.rows; ++group, row += kGroup) {
        const Span& keys = tile.group_keys[group];
        multiply<Layout::kTransposed, C>(min_of(kGroup, tile.rows - row), width_qk / kLanes<C>, keys.size(),
                                         {s.g + keys.begin * kBlockQ + row, kBlockQ},
                                         {s.k.rows + keys.begin * width_qk, width_qk},
                                         {s.dq + row * width_qk, width_qk}, true);
    }
}

// drab = scale G on the tile's rows and keys. S^T is no longer needed and holds the transpose.
template <class T, class C>
static void write_drab(const Tile& tile, const BackwardScratch<C>& s, C scale, T* to, int64_t to_stride) {
    transpose(s.g, kBlockQ, padded<C>(tile.cols), padded<C>(tile.rows), s.p, kBlockK);
    write_rows(s.p, kBlockK, tile.rows, tile.cols, scale, to, to_stride);
}

template <class T, class Mask>
static void backward_blocks(const BackwardParams& p, const QueryBlocks& blocks, void* partial_memory,
                            void* table_memory, void* memory) {
    using C = Compute<T>;
    const int head = blocks.head;
    const Sequence sequence(p, blocks.batch);
    const Mask mask(p, sequence, blocks.batch, head);
    const C scale = static_cast<C>(p.alpha_fp64) * static_cast<C>(p.inv_scaling_fp64);
    const int offset = sequence.len_k - sequence.len_q;

    Arena partial_arena(partial_memory), arena(memory);
    const Partial<C> partial(partial_arena, p, sequence.len_k);
    std::memset(partial_memory, 0, partial_arena.used());
    BackwardScratch<C> s(arena, p);
    const TablePartial<C> tables(p, sequence, table_memory);

    for (int row0 = blocks.first * kBlockQ; row0 < sequence.len_q; row0 += blocks.step * kBlockQ) {
        const int rows = min_of(kBlockQ, sequence.len_q - row0);
        s.q.pack(p.q.at<const T>(sequence.q_begin + row0, head), p.q.row_stride, rows);
        s.dout.pack(p.dout.at<const T>(sequence.q_begin + row0, head), p.dout.row_stride, rows);
        fill_zero(s.dq, int64_t{rows} * s.q.stride());
        for_each_tile(mask, row0, rows, [&](const Tile& tile) {
            s.k.pack(p.k.at<const T>(sequence.k_begin + tile.col0, head), p.k.row_stride, tile.cols);
            s.v.pack(p.v.at<const T>(sequence.k_begin + tile.col0, head), p.v.row_stride, tile.cols);
            if (p.rab.data != nullptr) pack_rab(RabBias<T>(p, sequence, blocks.batch, head), tile, s.rab);
            if (p.relative) pack_relative(RelativeBias<C>(p, sequence, blocks.batch, head), tile, s.relative);
            backward_tile<C>(tile, static_cast<C>(p.alpha_fp64), s, partial);
            if (table_memory != nullptr) add_table_gradients(tile, sequence.len_k, s.g, s.relative.buckets, tables);
            if (p.drab.data != nullptr)
                write_drab(tile, s, scale, p.drab.at<T>(blocks.batch, head, row0 + offset) + tile.col0,
                           p.drab.row_stride);
        });
        write_rows(s.dq, s.q.stride(), rows, p.dim_qk, scale, p.dq.at<T>(sequence.q_begin + row0, head),
                   p.dq.row_stride);
    }
}

// to[row, 0..dim) = scale * (from + the count - 1 further partials, each `distance` elements on); the sum is left in `from`.
template <class T, class C>
static void write_sums(C* from, int64_t distance, int count, int rows, int dim, C scale, T* to, int64_t to_stride) {
    const int width = padded<C>(dim);
    const int64_t elements = int64_t{rows} * width;
    for (int i = 1; i < count; ++i) {
        const C* other = from + i * distance;
        for (int64_t n = 0; n < elements; ++n) from[n] += other[n];
    }
    write_rows(from, width, rows, dim, scale, to, to_stride);
}

template <class T>
static void finish_rows(const BackwardParams& p, int batch, int head, void* partials, int count, int row0, int rows) {
    using C = Compute<T>;
    const Sequence sequence(p, batch);
    Arena arena(partials);
    const Partial<C> first(arena, p, sequence.len_k);
    const int64_t distance = static_cast<int64_t>(arena.used() / sizeof(C)), row = sequence.k_begin + row0;
    const C inv_scaling = static_cast<C>(p.inv_scaling_fp64);
    write_sums(first.dk + row0 * int64_t{padded<C>(p.dim_qk)}, distance, count, rows, p.dim_qk,
               static_cast<C>(p.alpha_fp64) * inv_scaling, p.dk.at<T>(row, head), p.dk.row_stride);
    write_sums(first.dv + row0 * int64_t{padded<C>(p.dim_v)}, distance, count, rows, p.dim_v, inv_scaling,
               p.dv.at<T>(row, head), p.dv.row_stride);
}

}  // namespace hstu::attention::cpu::HSTU_CPU_VARIANT
