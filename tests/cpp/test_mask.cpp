// Exhaustive host test of csrc/attention/mask.h and of Sequence in params.h, by brute force over small problems.
//
// The rules below are written from the mask table, one pair (i, j) at a time. Every mask type is compared with its rule
// on all small lengths, parameters and tile sizes: keeps() agrees, ranges cover every kept pair, full tiles hide none,
// spans are ordered, disjoint and inside the sequence. Prints how tight ranges and full tiles are; exits 1 on a
// failure.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "attention/mask.h"
#include "attention/params.h"
#include "attention/tile_walk.h"

namespace {

using namespace hstu::attention;

using Rule = std::function<bool(int i, int j)>;

int failures = 0;

void fail(const std::string& text) {
    if (++failures <= 20) std::printf("FAILED %s\n", text.c_str());
}

std::string str(std::initializer_list<int64_t> values) {
    std::string text = "(";
    for (const int64_t v : values) text += std::to_string(v) + " ";
    text.back() = ')';
    return text;
}

// How close the answers are to the best possible ones.
struct Tightness {
    int64_t cases = 0, range_given = 0, range_needed = 0, full_found = 0, full_possible = 0;

    void print(const char* name) const {
        std::printf("%-9s %9lld cases   needed of the columns and rows given: %5.1f %%   full tiles found: %5.1f %%\n",
                    name, static_cast<long long>(cases), range_given ? 100.0 * range_needed / range_given : 100.0,
                    full_possible ? 100.0 * full_found / full_possible : 100.0);
    }
};

// Compares a pair of spans over [0, length) with the indices that must be covered. Returns what is wrong, or nullptr.
const char* span_error(const Spans& spans, int length, const std::vector<char>& needed, Tightness& tight) {
    std::vector<int> given(length, 0);
    for (const Span& span : {spans.first, spans.second}) {
        if (span.size() == 0) continue;
        if (span.begin < 0 || span.end > length) return "a span reaches outside the sequence";
        for (int x = span.begin; x < span.end; ++x) ++given[x];
    }
    if (spans.first.size() && spans.second.size() && spans.second.begin < spans.first.end)
        return "the spans overlap or are out of order";
    for (int x = 0; x < length; ++x) {
        if (needed[x] && !given[x]) return "a kept pair is not covered";
        tight.range_given += given[x];
        tight.range_needed += needed[x];
    }
    return nullptr;
}

// The tiles of queries and keys that meet are the same seen from the keys and from the queries, and the ranks of a tile
// of queries' key tiles count from 0.
template <class Mask>
void check_tiles(const Mask& mask, int len_q, int len_k, int rows, int cols, const std::string& what) {
    std::vector<int> next((len_q + rows - 1) / rows, 0);
    for (int col0 = 0; col0 < len_k; col0 += cols) {
        const TileWalk walk(aligned(mask.q_range(col0, cols), rows), rows);
        for (int t = 0; t < walk.tiles; ++t) {
            const int row0 = walk[t];
            if (row0 % rows != 0 || row0 >= len_q) return fail(what + ": a tile of queries at " + str({row0, rows}));
            if (KeyTileRank(mask, row0, rows, col0, cols).rank != next[row0 / rows]++)
                return fail(what + ": rank of the keys at " + str({row0, rows, col0, cols}));
        }
    }
    for (int row0 = 0; row0 < len_q; row0 += rows)
        if (KeyTileRank(mask, row0, rows, 0, cols).count != next[row0 / rows])
            return fail(what + ": tiles of keys that meet the queries at " + str({row0, rows, cols}));
}

template <class Mask>
void check(const Mask& mask, int len_q, int len_k, const Rule& rule, const std::vector<int>& tiles, Tightness& tight,
           const std::string& what) {
    ++tight.cases;
    std::vector<char> kept(static_cast<size_t>(len_q) * len_k);
    for (int i = 0; i < len_q; ++i) {
        const auto row = mask.row(i);
        for (int j = -2; j < len_k + 3; ++j) {
            const bool inside = j >= 0 && j < len_k, expected = inside && rule(i, j);
            if (inside) kept[i * len_k + j] = expected;
            if (row.keeps(j) != expected) fail(what + ": row(i).keeps(j) at " + str({i, j}));
            if (mask.keep(i, j) != expected) fail(what + ": keep(i, j) at " + str({i, j}));
        }
    }
    for (const int rows : tiles) {
        for (int row0 = 0; row0 < len_q; ++row0) {
            std::vector<char> needed(len_k, 0);
            for (int i = row0; i < std::min(row0 + rows, len_q); ++i)
                for (int j = 0; j < len_k; ++j) needed[j] |= kept[i * len_k + j];
            const char* error = span_error(mask.kv_range(row0, rows), len_k, needed, tight);
            if (error) fail(what + " kv_range" + str({row0, rows}) + ": " + error);
        }
    }
    for (const int cols : tiles) {
        for (int col0 = 0; col0 < len_k; ++col0) {
            std::vector<char> needed(len_q, 0);
            for (int i = 0; i < len_q; ++i)
                for (int j = col0; j < std::min(col0 + cols, len_k); ++j) needed[i] |= kept[i * len_k + j];
            const char* error = span_error(mask.q_range(col0, cols), len_q, needed, tight);
            if (error) fail(what + " q_range" + str({col0, cols}) + ": " + error);
        }
    }
    if (Mask::kCheapRanges)
        for (const int rows : tiles)
            for (const int cols : tiles) check_tiles(mask, len_q, len_k, rows, cols, what);
    for (const int rows : tiles)
        for (const int cols : tiles)
            for (int row0 = 0; row0 < len_q; ++row0)
                for (int col0 = 0; col0 < len_k; ++col0) {
                    bool all = true;
                    for (int i = row0; all && i < std::min(row0 + rows, len_q); ++i)
                        for (int j = col0; all && j < std::min(col0 + cols, len_k); ++j) all = kept[i * len_k + j];
                    const bool found = mask.is_full(row0, rows, col0, cols);
                    if (found && !all) fail(what + ": is_full hides a masked pair " + str({row0, rows, col0, cols}));
                    tight.full_found += found;
                    tight.full_possible += all;
                }
}

Rule window_rule(int len_q, int len_k, int left, int right) {
    return [=](int i, int j) {
        const int p = i + len_k - len_q;
        return (left == -1 || j >= p - left) && (right == -1 || j <= p + right);
    };
}

Rule target_rule(int len_q, int len_k, int contexts, int targets, int group) {
    return [=](int i, int j) {
        const int p = i + len_k - len_q, history_end = len_k - targets;
        if (p < 0) return false;
        if (p < contexts) return j < history_end;
        if (p < history_end) return j <= p;
        if (j < history_end) return true;
        return (j - history_end) / group == (p - history_end) / group && j <= p;
    };
}

void check_window() {
    Tightness tight;
    for (int len_q = 0; len_q <= 8; ++len_q)
        for (int len_k = 0; len_k <= 8; ++len_k)
            for (const int left : {-1, 0, 1, 2, 3, 7, 8, 2147483647})
                for (const int right : {-1, 0, 1, 2, 5, 9, 2147483647}) {
                    const int l = left > 100 ? -1 : left, r = right > 100 ? -1 : right;
                    check(WindowMask(len_q, len_k, left, right), len_q, len_k, window_rule(len_q, len_k, l, r),
                          {1, 2, 3, 4, 16}, tight, "window" + str({len_q, len_k, left, right}));
                }
    std::mt19937 random(1);
    for (int n = 0; n < 25; ++n) {
        const int len_q = 1 + random() % 200, len_k = 1 + random() % 200;
        const int left = static_cast<int>(random() % 150) - 1, right = static_cast<int>(random() % 150) - 1;
        check(WindowMask(len_q, len_k, left, right), len_q, len_k, window_rule(len_q, len_k, left, right), {64, 128},
              tight, "window" + str({len_q, len_k, left, right}));
    }
    tight.print("window");
}

void check_target() {
    Tightness tight;
    for (int len_q = 0; len_q <= 8; ++len_q)
        for (int len_k = 0; len_k <= 8; ++len_k)
            for (int contexts = 0; contexts <= len_k; ++contexts)
                for (int targets = 0; contexts + targets <= len_k; ++targets)
                    for (const int group : {1, 2, 3, 8, 2147483647})
                        check(TargetMask(len_q, len_k, contexts, targets, group), len_q, len_k,
                              target_rule(len_q, len_k, contexts, targets, group), {1, 2, 3, 16}, tight,
                              "target" + str({len_q, len_k, contexts, targets, group}));
    std::mt19937 random(2);
    for (int n = 0; n < 25; ++n) {
        const int len_q = 1 + random() % 200, len_k = 1 + random() % 200;
        const int contexts = random() % (len_k + 1), targets = random() % (len_k - contexts + 1);
        const int group = 1 + random() % 9;
        check(TargetMask(len_q, len_k, contexts, targets, group), len_q, len_k,
              target_rule(len_q, len_k, contexts, targets, group), {64, 128}, tight,
              "target" + str({len_q, len_k, contexts, targets, group}));
    }
    tight.print("target");

    // Counts that no sequence can hold are brought inside it.
    const std::vector<int64_t> wild = {INT64_MIN, -5, 0, 3, 9, INT64_MAX};
    for (const int64_t contexts : wild)
        for (const int64_t targets : wild)
            for (const int group : {-2147483647, 0, 1}) {
                const TargetMask mask(5, 6, contexts, targets, group);
                if (mask.contexts < 0 || mask.history_end < mask.contexts || mask.history_end > 6 || mask.group < 1)
                    fail("target: parts outside the sequence for " + str({contexts, targets, group}));
            }
}

// func[m][i], count bounds for each of len_q rows.
Rule interval_rule(const std::vector<int32_t>& func, int count, int stride) {
    return [&func, count, stride](int i, int j) {
        if (j < func[i]) return true;
        for (int m = 1; m < count; m += 2)
            if (func[m * stride + i] <= j && j < func[(m + 1) * stride + i]) return true;
        return false;
    };
}

void check_interval() {
    Tightness tight;
    // One row: every list of 1 or 3 bounds. Several rows and 5 bounds: random lists, bounds in any order.
    for (int len_k = 0; len_k <= 6; ++len_k)
        for (const int count : {1, 3})
            for (int code = 0, values = len_k + 3, codes = count == 1 ? values : values * values * values; code < codes;
                 ++code) {
                std::vector<int32_t> func;
                for (int m = 0, rest = code; m < count; ++m, rest /= values) func.push_back(rest % values - 1);
                check(IntervalMask(1, len_k, func.data(), count, 1), 1, len_k, interval_rule(func, count, 1),
                      {1, 2, 16}, tight, "interval" + str({len_k, count, code}));
            }
    std::mt19937 random(3);
    for (int n = 0; n < 20000; ++n) {
        const int len_q = random() % 7, len_k = random() % 9, count = 1 + 2 * (random() % 3);
        const int stride = len_q + random() % 3;
        std::vector<int32_t> func(count * stride + 1);
        for (int32_t& f : func) f = static_cast<int>(random() % (len_k + 5)) - 2;
        check(IntervalMask(len_q, len_k, func.data(), count, stride), len_q, len_k, interval_rule(func, count, stride),
              {1, 2, 3, 16}, tight, "interval" + str({len_q, len_k, count, n}));
    }
    tight.print("interval");
}

// Whatever the offsets hold, the rows of a sequence lie inside the tensors.
void check_sequence() {
    const std::vector<int64_t> values = {INT64_MIN, INT32_MIN, -7, -1, 0, 1, 3, 5, 6, INT32_MAX, INT64_MAX};
    int64_t cases = 0;
    for (const bool wide : {false, true})
        for (const int64_t first : values)
            for (const int64_t second : values)
                for (const int64_t used : values)
                    for (const int max_len : {0, 1, 4, 100})
                        for (const int64_t total : {int64_t{0}, int64_t{5}, int64_t{1} << 40}) {
                            const std::vector<int64_t> offsets64 = {first, second}, used64 = {used};
                            const std::vector<int32_t> offsets32 = {static_cast<int32_t>(first),
                                                                    static_cast<int32_t>(second)};
                            const std::vector<int32_t> used32 = {static_cast<int32_t>(used)};
                            Params p;
                            p.total_q = p.total_k = total;
                            p.max_seqlen_q = p.max_seqlen_k = max_len;
                            p.cu_seqlens_q.data = p.cu_seqlens_k.data =
                                wide ? static_cast<const void*>(offsets64.data()) : offsets32.data();
                            p.seqused_q.data = wide ? static_cast<const void*>(used64.data()) : used32.data();
                            p.cu_seqlens_q.is_int64 = p.cu_seqlens_k.is_int64 = p.seqused_q.is_int64 = wide;
                            const Sequence s(p, 0);
                            const bool inside = s.q_begin >= 0 && s.alloc_q >= 0 && s.q_begin + s.alloc_q <= total &&
                                                s.k_begin >= 0 && s.alloc_k >= 0 && s.k_begin + s.alloc_k <= total;
                            const bool short_enough = s.len_q >= 0 && s.len_q <= s.alloc_q && s.len_q <= max_len &&
                                                      s.len_k >= 0 && s.len_k <= s.alloc_k && s.len_k <= max_len;
                            if (!inside || !short_enough)
                                fail("sequence" + str({wide, first, second, used, max_len, total}));
                            ++cases;
                        }
    std::printf("%-9s %9lld cases\n", "sequence", static_cast<long long>(cases));
}

}  // namespace

int main() {
    check_window();
    check_target();
    check_interval();
    check_sequence();
    std::printf("%d failures\n", failures);
    return failures ? 1 : 0;
}
