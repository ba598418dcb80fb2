// The jagged copies on the CPU.
//
// The rows that are written, or for a split those that are read, are cut into blocks, however they are spread over
// sequences and parts, and the threads take one block after the other. Inside of a block whatever is contiguous on both
// sides is one memcpy. Fresh memory costs more than the copy, a page at a time, so large results ask for huge pages; blocks
// are as large as these where there are enough, so that two threads seldom meet in one.
#include <cstring>

#include "common/host_device.h"
#include "common/large_pages.h"
#include "common/parallel.h"
#include "jagged/jagged.h"

namespace hstu::jagged::cpu {
namespace {

constexpr int64_t kLeastBlockBytes = 256 << 10, kMostBlockBytes = kLargePageBytes;
constexpr int kBlocksOfThread = 8;
constexpr int64_t kRoundBytes = 8 << 10;  // of interleaved rows written part by part: stays in the first cache

template <int kRowBytes>
void copy_each(char* to, int64_t to_stride, const char* from, int64_t from_stride, int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) std::memcpy(to + i * to_stride, from + i * from_stride, kRowBytes);
}

void copy_rows(char* to, int64_t to_stride, const char* from, int64_t from_stride, int64_t rows, int64_t row_bytes) {
    if (rows <= 0 || row_bytes == 0) return;
    if (rows == 1 || (to_stride == row_bytes && from_stride == row_bytes)) {
        std::memcpy(to, from, static_cast<size_t>(rows * row_bytes));
        return;
    }
    switch (row_bytes) {  // a copy of a size known here is a move or two instead of a call
        case 1: return copy_each<1>(to, to_stride, from, from_stride, rows);
        case 2: return copy_each<2>(to, to_stride, from, from_stride, rows);
        case 4: return copy_each<4>(to, to_stride, from, from_stride, rows);
        case 8: return copy_each<8>(to, to_stride, from, from_stride, rows);
        case 16: return copy_each<16>(to, to_stride, from, from_stride, rows);
        case 32: return copy_each<32>(to, to_stride, from, from_stride, rows);
        case 64: return copy_each<64>(to, to_stride, from, from_stride, rows);
        case 128: return copy_each<128>(to, to_stride, from, from_stride, rows);
    }
    for (int64_t i = 0; i < rows; ++i)
        std::memcpy(to + i * to_stride, from + i * from_stride, static_cast<size_t>(row_bytes));
}

// `bytes` of a pattern that begins anew at every multiple of 8.
void fill_bytes(char* to, int64_t bytes, uint64_t pattern) {
    const int low = static_cast<int>(pattern & 0xff);
    if (pattern == low * uint64_t{0x0101010101010101}) {
        std::memset(to, low, static_cast<size_t>(bytes));
        return;
    }
    int64_t i = 0;
    for (; i + 8 <= bytes; i += 8) std::memcpy(to + i, &pattern, 8);
    std::memcpy(to + i, &pattern, static_cast<size_t>(bytes - i));
}

void fill_rows(char* to, int64_t stride, int64_t rows, int64_t row_bytes, uint64_t pattern) {
    if (rows <= 0 || row_bytes == 0) return;
    if (rows == 1 || stride == row_bytes) return fill_bytes(to, rows * row_bytes, pattern);
    for (int64_t i = 0; i < rows; ++i) fill_bytes(to + i * stride, row_bytes, pattern);
}

void advise(const Rows& rows, int64_t row_bytes) {
    if (rows.stride == row_bytes) prefer_large_pages(rows.data, rows.count * row_bytes);
}

// Rows outside of [begin, end) become 0.
void zero_outside(const Rows& rows, int64_t begin, int64_t end, int64_t row_bytes) {
    fill_rows(rows.data, rows.stride, begin, row_bytes, 0);
    fill_rows(rows.data + end * rows.stride, rows.stride, rows.count - end, row_bytes, 0);
}

// The last sequence that begins at or before `row`, which is in one: offsets[0] <= row < offsets[batch].
int64_t sequence_of(const IndexArray& offsets, int64_t batch, int64_t row) {
    int64_t low = 0, high = batch;  // offsets[low] <= row < offsets[high]
    while (high - low > 1) {
        const int64_t middle = low + (high - low) / 2;
        (offsets[middle] <= row ? low : high) = middle;
    }
    return low;
}

// Calls body(first, last) for the blocks of [begin, end).
template <class Body>
void for_blocks(int64_t begin, int64_t end, int64_t row_bytes, int num_threads, const Body& body) {
    if (row_bytes == 0) return;
    const int64_t share = (end - begin) * row_bytes / (kBlocksOfThread * max_of(1, num_threads));
    const int64_t rows = max_of<int64_t>(1, clamp_to<int64_t>(share, kLeastBlockBytes, kMostBlockBytes) / row_bytes);
    parallel_for(ceil_div(end - begin, rows), num_threads, [&](int64_t block, int) {
        const int64_t first = begin + block * rows;
        body(first, min_of(first + rows, end));
    });
}

// Rows [part_row, part_row + rows) of a part are every `step`-th of the joined rows from joined_row on.
void copy_part(const JoinParams& p, const Part& part, int64_t part_row, int64_t joined_row, int64_t step,
               int64_t rows) {
    char* const joined = p.joined.data + joined_row * p.joined.stride;
    char* const own = part.rows.data + part_row * part.rows.stride;
    if (p.split)
        copy_rows(own, part.rows.stride, joined, step * p.joined.stride, rows, p.row_bytes);
    else
        copy_rows(joined, step * p.joined.stride, own, part.rows.stride, rows, p.row_bytes);
}

// What of sequence b lies in the joined rows [first, last); the sequence begins at joined row `base`.
void concat_sequence(const JoinParams& p, int64_t b, int64_t base, int64_t first, int64_t last) {
    for (int i = 0; i < p.part_count && base < last; ++i) {
        const Part& part = p.parts[i];
        const int64_t part_begin = part.offsets[b], length = part.offsets[b + 1] - part_begin;
        const int64_t from = max_of(first, base), to = min_of(last, base + length);
        if (from < to) copy_part(p, part, part_begin + from - base, from, 1, to - from);
        base += length;
    }
}

// Round t of a sequence is row t of every part that has one. A block has the rounds that begin in it.
class Rounds {
  public:
    Rounds(const JoinParams& p, int64_t b) : p_(p) {
        for (int i = 0; i < p.part_count; ++i) {
            begin_[i] = p.parts[i].offsets[b];
            length_[i] = p.parts[i].offsets[b + 1] - begin_[i];
            longest_ = max_of(longest_, length_[i]);
        }
    }

    // The joined rows before round t.
    int64_t before(int64_t t) const {
        int64_t rows = 0;
        for (int i = 0; i < p_.part_count; ++i) rows += min_of(length_[i], t);
        return rows;
    }

    // The first round that begins at `row` or later.
    int64_t first_from(int64_t row) const {
        int64_t low = 0, high = longest_;
        while (low < high) {
            const int64_t middle = low + (high - low) / 2;
            if (before(middle) < row)
                low = middle + 1;
            else
                high = middle;
        }
        return low;
    }

    // Copies rounds [t, last); the sequence begins at joined row `base`. Between two steps the same parts have rows.
    void copy(int64_t base, int64_t t, int64_t last) const {
        const int64_t at_most = kRoundBytes / p_.row_bytes;
        for (int64_t row = base + before(t); t < last;) {
            int64_t active = 0, end = last;
            for (int i = 0; i < p_.part_count; ++i) {
                if (length_[i] <= t) continue;
                ++active;
                end = min_of(end, length_[i]);
            }
            const int64_t rounds = min_of(end - t, max_of<int64_t>(1, at_most / active));
            int64_t place = row;
            for (int i = 0; i < p_.part_count; ++i)
                if (length_[i] > t) copy_part(p_, p_.parts[i], begin_[i] + t, place++, active, rounds);
            t += rounds;
            row += rounds * active;
        }
    }

  private:
    const JoinParams& p_;
    int64_t begin_[kMaxParts], length_[kMaxParts];
    int64_t longest_ = 0;
};

void interleave_sequence(const JoinParams& p, int64_t b, int64_t base, int64_t first, int64_t last) {
    const Rounds rounds(p, b);
    rounds.copy(base, rounds.first_from(first - base), rounds.first_from(last - base));
}

template <class T>
void add_offsets(const JoinParams& p) {
    T* const sum = static_cast<T*>(p.joined_offsets);
    std::memcpy(sum, p.parts[0].offsets.data, static_cast<size_t>(p.batch + 1) * sizeof(T));
    for (int i = 1; i < p.part_count; ++i) {
        const T* const own = static_cast<const T*>(p.parts[i].offsets.data);
        for (int64_t b = 0; b <= p.batch; ++b) sum[b] += own[b];
    }
}

}  // namespace

void join(const JoinParams& p) {
    if (p.split)
        for (const Part& part : p.parts) advise(part.rows, p.row_bytes);
    else
        advise(p.joined, p.row_bytes);
    p.offsets_are_int64 ? add_offsets<int64_t>(p) : add_offsets<int32_t>(p);
    const IndexArray offsets{p.joined_offsets, p.offsets_are_int64};
    if (p.split) {
        for (int i = 0; i < p.part_count; ++i)
            zero_outside(p.parts[i].rows, p.parts[i].offsets[0], p.parts[i].offsets[p.batch], p.row_bytes);
    } else {
        zero_outside(p.joined, offsets[0], offsets[p.batch], p.row_bytes);
    }
    for_blocks(offsets[0], offsets[p.batch], p.row_bytes, p.num_threads, [&](int64_t first, int64_t last) {
        for (int64_t b = sequence_of(offsets, p.batch, first); b < p.batch && offsets[b] < last; ++b) {
            if (p.order == Order::kConcat)
                concat_sequence(p, b, offsets[b], first, last);
            else
                interleave_sequence(p, b, offsets[b], first, last);
        }
    });
}

namespace {

void copy_to_dense(const DenseParams& p) {
    advise({p.dense, p.batch, p.batch_stride}, p.max_len * p.row_bytes);
    for_blocks(0, p.batch * p.max_len, p.row_bytes, p.num_threads, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last;) {
            const int64_t b = row / p.max_len, t = row % p.max_len;
            const int64_t begin = p.offsets[b], length = min_of(p.offsets[b + 1] - begin, p.max_len);
            const int64_t end = min_of(p.max_len, t + last - row), copied = max_of<int64_t>(0, min_of(length, end) - t);
            char* const to = p.dense + b * p.batch_stride + t * p.dense_stride;
            copy_rows(to, p.dense_stride, p.jagged.data + (begin + t) * p.jagged.stride, p.jagged.stride, copied,
                      p.row_bytes);
            fill_rows(to + copied * p.dense_stride, p.dense_stride, end - t - copied, p.row_bytes, p.padding);
            row += end - t;
        }
    });
}

void copy_to_jagged(const DenseParams& p) {
    advise(p.jagged, p.row_bytes);
    const int64_t first_row = p.offsets[0], last_row = p.offsets[p.batch];
    zero_outside(p.jagged, first_row, last_row, p.row_bytes);
    for_blocks(first_row, last_row, p.row_bytes, p.num_threads, [&](int64_t first, int64_t last) {
        for (int64_t b = sequence_of(p.offsets, p.batch, first); b < p.batch && p.offsets[b] < last; ++b) {
            const int64_t begin = max_of(first, p.offsets[b]), end = min_of(last, p.offsets[b + 1]);
            const int64_t t = begin - p.offsets[b], copied = clamp_to<int64_t>(p.max_len - t, 0, end - begin);
            char* const to = p.jagged.data + begin * p.jagged.stride;
            copy_rows(to, p.jagged.stride, p.dense + b * p.batch_stride + t * p.dense_stride, p.dense_stride, copied,
                      p.row_bytes);
            fill_rows(to + copied * p.jagged.stride, p.jagged.stride, end - begin - copied, p.row_bytes, 0);
        }
    });
}

}  // namespace

void dense(const DenseParams& p) { p.to_jagged ? copy_to_jagged(p) : copy_to_dense(p); }

}  // namespace hstu::jagged::cpu
