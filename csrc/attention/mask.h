// Which (query, key) pairs of a sequence attend. The one statement of every mask, for CPU and CUDA, forward and backward.
//
// A mask is a type with run-time integers, built from (params, sequence, batch index, head):
//   row(i).keeps(j)                       does query row i keep key j?   keep(i, j) is the same in one call
//   kv_range(row0, rows)                  the keys that any of these query rows keeps (a superset, as at most two spans)
//   q_range(col0, cols)                   the query rows that keep any of these keys (likewise)
//   kCheapRanges                          a range costs a few instructions, not a read per row
//   is_full(row0, rows, col0, cols)       every pair of the tile that lies inside the sequence is kept
// Rows and columns count from the start of the sequence; query row i sits at position p = i + (len_k - len_q).
// Tiles outside the ranges are skipped, full tiles test nothing. Rows and columns past the end of the sequence may be
// ignored by is_full(): kernels load zeros there, and silu(0) = 0.
#pragma once

#include <cstdint>

#include "attention/params.h"
#include "common/host_device.h"

namespace hstu::attention {

struct Span {
    int begin = 0, end = 0;  // [begin, end), empty when end <= begin

    HSTU_HOST_DEVICE int size() const { return max_of(0, end - begin); }
};

// At most two spans, the first before the second, not overlapping.
struct Spans {
    Span first, second;
};

// Does any of [begin, begin + size) lie in the spans?
HSTU_HOST_DEVICE bool overlaps(const Spans& spans, int begin, int size) {
    return (begin < spans.first.end && begin + size > spans.first.begin) ||
           (begin < spans.second.end && begin + size > spans.second.begin);
}

enum class MaskKind : int { kWindow, kTarget, kInterval };

// p - left <= j <= p + right. Full, causal and local attention.
struct WindowMask {
    static constexpr MaskKind kKind = MaskKind::kWindow;
    static constexpr bool kCheapRanges = true;
    static constexpr int kUnbounded = 1 << 29;

    int len_q, len_k, offset, left, right;

    struct Row {
        int begin, end;
        HSTU_HOST_DEVICE bool keeps(int col) const { return col >= begin && col < end; }
    };

    HSTU_HOST_DEVICE WindowMask(int len_q, int len_k, int window_left, int window_right)
        : len_q(len_q), len_k(len_k), offset(len_k - len_q),
          left(window_left < 0 ? kUnbounded : min_of(window_left, +kUnbounded)),
          right(window_right < 0 ? kUnbounded : min_of(window_right, +kUnbounded)) {}
    HSTU_HOST_DEVICE WindowMask(const Params& p, const Sequence& s, int, int)
        : WindowMask(s.len_q, s.len_k, p.window_left, p.window_right) {}

    HSTU_HOST_DEVICE Row row(int i) const {
        const int position = i + offset;
        return {max_of(0, position - left), min_of(len_k, position + right + 1)};
    }
    HSTU_HOST_DEVICE bool keep(int i, int j) const { return row(i).keeps(j); }

    HSTU_HOST_DEVICE Spans kv_range(int row0, int rows) const {
        const int last = min_of(row0 + rows, len_q) - 1;
        return {{row(row0).begin, row(last).end}, {}};
    }
    HSTU_HOST_DEVICE Spans q_range(int col0, int cols) const {
        const int last = min_of(col0 + cols, len_k) - 1;
        return {{max_of(0, col0 - right - offset), min_of(len_q, last + left - offset + 1)}, {}};
    }
    HSTU_HOST_DEVICE bool is_full(int row0, int rows, int col0, int cols) const {
        const int last_row = min_of(row0 + rows, len_q) - 1, last_col = min_of(col0 + cols, len_k) - 1;
        return col0 >= last_row + offset - left && last_col <= row0 + offset + right;
    }
};

// [contexts | history | targets], causal. Contexts see all of contexts and history, history is causal, a target sees
// contexts, history and the earlier members of its own group.
struct TargetMask {
    static constexpr MaskKind kKind = MaskKind::kTarget;
    static constexpr bool kCheapRanges = true;

    int len_q, len_k, offset;
    int contexts;     // positions before it are contexts
    int history_end;  // positions from it on are targets
    int group;        // targets per group

    struct Row {
        int end;                     // keeps [0, end)
        int group_begin, group_end;  // and [group_begin, group_end)
        HSTU_HOST_DEVICE bool keeps(int col) const {
            return (col >= 0 && col < end) || (col >= group_begin && col < group_end);
        }
    };

    HSTU_HOST_DEVICE TargetMask(int len_q, int len_k, int64_t num_contexts, int64_t num_targets, int group_size)
        : len_q(len_q), len_k(len_k), offset(len_k - len_q), group(clamp_to(group_size, 1, 1 << 29)) {
        history_end = len_k - static_cast<int>(clamp_to<int64_t>(num_targets, 0, len_k));
        contexts = static_cast<int>(clamp_to<int64_t>(num_contexts, 0, history_end));
    }
    HSTU_HOST_DEVICE TargetMask(const Params& p, const Sequence& s, int b, int)
        : TargetMask(s.len_q, s.len_k, p.num_contexts ? p.num_contexts[b] : 0, p.num_targets ? p.num_targets[b] : 0,
                     p.target_group_size) {}

    HSTU_HOST_DEVICE Row row(int i) const {
        const int position = i + offset;  // negative where len_q > len_k: such a row is no context and keeps nothing
        if (position >= 0 && position < contexts) return {history_end, 0, 0};
        if (position < history_end) return {position + 1, 0, 0};
        return {history_end, group_start(position), min_of(len_k, position + 1)};
    }
    HSTU_HOST_DEVICE bool keep(int i, int j) const { return row(i).keeps(j); }

    HSTU_HOST_DEVICE Spans kv_range(int row0, int rows) const {
        const int first = row0 + offset, last = min_of(row0 + rows, len_q) - 1 + offset;
        if (last < history_end) return {{0, last >= 0 && max_of(first, 0) < contexts ? history_end : last + 1}, {}};
        return {{0, history_end}, {group_start(max_of(first, history_end)), last + 1}};
    }
    HSTU_HOST_DEVICE Spans q_range(int col0, int cols) const {
        const int last = min_of(col0 + cols, len_k) - 1;
        if (col0 >= history_end)
            return {{max_of(0, col0 - offset), min_of(len_q, group_start(last) + group - offset)}, {}};
        return {{max_of(0, -offset), clamp_to(contexts - offset, 0, len_q)},
                {max_of(0, max_of(contexts, col0) - offset), len_q}};
    }
    HSTU_HOST_DEVICE bool is_full(int row0, int rows, int col0, int cols) const {
        const int last = min_of(row0 + rows, len_q) - 1 + offset, last_col = min_of(col0 + cols, len_k) - 1;
        const int first = max_of(row0 + offset, contexts);  // the first row that is not a context
        return row0 + offset >= 0 && last_col < history_end && (first > last || last_col <= first);
    }

  private:
    HSTU_HOST_DEVICE int group_start(int position) const {
        return history_end + (position - history_end) / group * group;
    }
};

// j in [0, f0) u [f1, f2) u [f3, f4) ..., with f read per head and query row.
struct IntervalMask {
    static constexpr MaskKind kKind = MaskKind::kInterval;
    static constexpr bool kCheapRanges = false;

    int len_q, len_k;
    const int32_t* func;  // [count, >= len_q], column 0 = query row 0 of this sequence
    int count;            // odd
    int64_t stride;

    struct Row {
        const int32_t* func;
        int count, len_k;
        int64_t stride;
        int first_end;  // f0
        HSTU_HOST_DEVICE bool keeps(int col) const {
            bool kept = col < first_end;
            for (int m = 1; m + 1 < count; m += 2)
                kept = kept || (col >= func[m * stride] && col < func[(m + 1) * stride]);
            return kept && col >= 0 && col < len_k;
        }
    };

    HSTU_HOST_DEVICE IntervalMask(int len_q, int len_k, const int32_t* func, int count, int64_t stride)
        : len_q(len_q), len_k(len_k), func(func), count(count), stride(stride) {}
    HSTU_HOST_DEVICE IntervalMask(const Params& p, const Sequence& s, int, int head)
        : IntervalMask(s.len_q, s.len_k, p.func + head * p.func_head_stride + s.q_begin, p.func_count, p.func_stride) {}

    HSTU_HOST_DEVICE Row row(int i) const {
        const int32_t* f = func + min_of(i, len_q - 1);
        return {f, count, len_k, stride, f[0]};
    }
    HSTU_HOST_DEVICE bool keep(int i, int j) const { return row(i).keeps(j); }

    HSTU_HOST_DEVICE Spans kv_range(int row0, int rows) const {
        int begin = len_k, end = 0;
        for (int i = row0; i < min_of(row0 + rows, len_q); ++i) {
            if (func[i] > 0) begin = 0, end = max_of(end, func[i]);
            for (int m = 1; m + 1 < count; m += 2) {
                const int from = func[m * stride + i], to = func[(m + 1) * stride + i];
                if (from < to) begin = min_of(begin, from), end = max_of(end, to);
            }
        }
        return {{max_of(0, begin), min_of(len_k, end)}, {}};
    }
    HSTU_HOST_DEVICE Spans q_range(int, int) const { return {{0, len_q}, {}}; }
    HSTU_HOST_DEVICE bool is_full(int, int, int, int) const { return false; }
};

}  // namespace hstu::attention
