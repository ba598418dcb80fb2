// sm90/backward.h on the emulator against the definition: masks, ragged batches, every tile, blocks that wait for one
// another, early and late copies and products, and the same bits whatever the order where that is promised.
#include "emulator.h"

#include "attention/sm90/backward.h"
#include "attention/time_bucket.h"

#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#ifndef RELATIVE
#define RELATIVE false
#endif

using namespace hstu;
using namespace hstu::attention;

namespace {

struct Case {
    const char* name;
    std::vector<int> lengths_q, lengths_k;
    int heads = 2;
    int window_left = -1, window_right = 0;
    std::vector<int> used_q = {}, used_k = {}, contexts = {}, targets = {};
    int group = 1;
    int before = 0, after = 0;  // rows outside the sequences
    int dim_qk = 0, dim_v = 0;
    // The relative bias, with RELATIVE.
    enum class Times { kRising, kTied, kShuffled, kMilliseconds, kExtreme, kNone } times = Times::kRising;
    int reach = 1000, num_buckets = 64;  // reach < 0: no position table
    bool table_per_head = false;
};

struct Packed {
    std::vector<bf16> values;
    Jagged view;

    // Heads behind one another, rows with a gap; `fill` everywhere.
    Packed(int64_t rows, int heads, int dim, float fill)
        : values(static_cast<size_t>(rows) * heads * (dim + 8) + 8, bf16(fill)),
          view{values.data(), int64_t{heads} * (dim + 8), dim + 8} {}
    bf16& at(int64_t row, int head, int col) { return view.at<bf16>(row, head)[col]; }
};

std::vector<int> offsets_of(const std::vector<int>& lengths, int before) {
    std::vector<int> offsets{before};
    for (int n : lengths) offsets.push_back(offsets.back() + n);
    return offsets;
}

void compare(const Case& c, const char* what, const Params& p, Packed& got, const std::vector<double>& expected,
             const std::vector<char>& used, int64_t rows, int dim) {
    double error = 0, norm = 0;
    for (int64_t row = 0; row < rows; ++row)
        for (int h = 0; h < p.heads; ++h) {
            double row_error = 0;
            for (int d = 0; d < dim; ++d) {
                const bf16 x = got.at(row, h, d);
                const double wanted = expected[(row * p.heads + h) * dim + d],
                             difference = static_cast<float>(x) - wanted;
                row_error += difference * difference, norm += wanted * wanted;
                if (!used[row] && x.bits != 0)
                    emulated::fail(std::string(c.name) + ": an unused row of " + what + " is not 0");
            }
            error += row_error;
            if (!(row_error >= 0))
                emulated::fail(std::string(c.name) + ": NaN in row " + std::to_string(row) + " of " + what);
            for (int d = dim; d < dim + 8; ++d)
                if (!std::isnan(static_cast<float>(got.at(row, h, d))))
                    emulated::fail(std::string(c.name) + ": written outside " + what);
        }
    if (!(std::sqrt(error) <= 8e-3 * std::sqrt(norm)))
        emulated::fail(std::string(c.name) + ": " + what + " is wrong by " + std::to_string(std::sqrt(error / norm)));
}

// sizes: the sums of abs(dP / N), as slopes are rounded to half precision. An entry without terms is exactly 0.
void compare_table(const Case& c, const char* what, const std::vector<float>& got, const std::vector<double>& expected,
                   const std::vector<double>& sizes) {
    for (size_t i = 0; i < got.size(); ++i)
        if (!(std::abs(got[i] - expected[i]) <= 4e-3 * sizes[i]))
            emulated::fail(std::string(c.name) + ": entry " + std::to_string(i) + " of " + what + " is " +
                           std::to_string(got[i]) + ", not " + std::to_string(expected[i]));
}

// Times of one sequence; those of queries follow those of keys where the two are as many.
void draw_times(Case::Times kind, std::mt19937& random, int64_t* queries, int len_q, int64_t* keys, int len_k) {
    std::lognormal_distribution<double> gaps(kind == Case::Times::kMilliseconds ? 13.3 : 6.4, 2.0);
    const int longest = std::max(len_q, len_k) + 1;
    std::vector<int64_t> times(static_cast<size_t>(longest), 1'600'000'000);
    for (int i = 1; i < longest; ++i) {
        const int64_t gap = kind == Case::Times::kTied ? random() % 8 / 6 : static_cast<int64_t>(gaps(random));
        times[i] = times[i - 1] + gap;
    }
    if (kind == Case::Times::kShuffled) std::shuffle(times.begin(), times.end(), random);
    if (kind == Case::Times::kExtreme)
        for (int64_t& t : times)
            t = static_cast<int64_t>((uint64_t{random()} << 32 | random()) >> (random() % 3 * 31)) *
                (random() % 2 ? 1 : -1);
    std::copy_n(times.begin() + (longest - len_q), len_q, queries);
    std::copy_n(times.begin() + (longest - 1 - len_k), len_k, keys);
}

// The gradients' bits.
template <int kHeadDim, class Mask, class Config>
std::vector<uint16_t> check(const Case& c, unsigned seed, bool deterministic) {
    const std::vector<int> cu_q = offsets_of(c.lengths_q, c.before), cu_k = offsets_of(c.lengths_k, c.before);
    BackwardParams p;
    p.batch = static_cast<int>(c.lengths_q.size());
    p.heads = c.heads;
    p.dim_qk = c.dim_qk, p.dim_v = c.dim_v;
    p.total_q = cu_q.back() + c.after, p.total_k = cu_k.back() + c.after;
    p.max_seqlen_q = *std::max_element(c.lengths_q.begin(), c.lengths_q.end());
    p.max_seqlen_k = *std::max_element(c.lengths_k.begin(), c.lengths_k.end());
    p.alpha = 0.2f, p.inv_scaling = 1.0f / 64, p.deterministic = deterministic;
    p.cu_seqlens_q = {cu_q.data(), false}, p.cu_seqlens_k = {cu_k.data(), false};
    const auto array = [](const std::vector<int>& x) { return IndexArray{x.empty() ? nullptr : x.data(), false}; };
    p.seqused_q = array(c.used_q), p.seqused_k = array(c.used_k);
    p.num_contexts = array(c.contexts), p.num_targets = array(c.targets);
    p.target_group_size = c.group, p.window_left = c.window_left, p.window_right = c.window_right;

    Packed q(p.total_q, c.heads, c.dim_qk, NAN), k(p.total_k, c.heads, c.dim_qk, NAN);
    Packed v(p.total_k, c.heads, c.dim_v, NAN), dout(p.total_q, c.heads, c.dim_v, NAN);
    Packed dq = q, dk = k, dv = v;
    const auto view = [](Packed& x, const Jagged& like) {
        return Jagged{x.values.data(), like.row_stride, like.head_stride};
    };
    p.q = q.view, p.k = k.view, p.v = v.view, p.dout = dout.view;
    dq.view = p.dq = view(dq, q.view), dk.view = p.dk = view(dk, k.view), dv.view = p.dv = view(dv, v.view);
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    const auto draw = [&](Packed& x, int64_t row, int head, int dim) {
        for (int d = 0; d < dim; ++d) x.at(row, head, d) = bf16(normal(random));
    };
    for (int b = 0; b < p.batch; ++b) {
        const Sequence s(p, b);
        for (int h = 0; h < c.heads; ++h) {
            for (int i = 0; i < s.len_q; ++i)
                draw(q, s.q_begin + i, h, c.dim_qk), draw(dout, s.q_begin + i, h, c.dim_v);
            for (int j = 0; j < s.len_k; ++j) draw(k, s.k_begin + j, h, c.dim_qk), draw(v, s.k_begin + j, h, c.dim_v);
        }
    }
    const bool of_time = RELATIVE && c.times != Case::Times::kNone, of_position = RELATIVE && c.reach >= 0;
    std::vector<int64_t> query_times(static_cast<size_t>(p.total_q), INT64_MIN), key_times(p.total_k, INT64_MAX);
    const int tables = c.table_per_head ? c.heads : 1, positions = of_position ? 2 * c.reach + 1 : 0;
    const int buckets = of_time ? c.num_buckets + 1 : 0;
    std::vector<float> position(static_cast<size_t>(tables * positions)), time(static_cast<size_t>(tables * buckets));
    for (float& x : position) x = 0.5f * normal(random);
    for (float& x : time) x = 0.5f * normal(random);
    std::vector<float> dposition(position.size(), NAN), dtime(time.size(), NAN);
    std::vector<int64_t> table_accum((position.size() + time.size()) * kExactWords, 0);
    if (of_position) {
        p.relative.position = position.data(), p.relative.reach = c.reach, p.dposition = dposition.data();
        if (c.table_per_head) p.relative.position_head_stride = p.dposition_head_stride = positions;
    }
    if (of_time) {
        p.relative.time = time.data(), p.relative.num_buckets = c.num_buckets, p.dtime = dtime.data();
        if (c.table_per_head) p.relative.time_head_stride = p.dtime_head_stride = buckets;
        p.relative.query_times = query_times.data(), p.relative.key_times = key_times.data();
        for (int b = 0; b < p.batch; ++b) {
            const Sequence s(p, b);
            draw_times(c.times, random, &query_times[s.q_begin], s.len_q, &key_times[s.k_begin], s.len_k);
        }
    }
    if (RELATIVE) p.table_accum = table_accum.data();
    // For this tile: dq_scratch_elements() asks for the one that serves such a batch, which may be another.
    const int64_t sums = p.max_seqlen_k > Config::cluster * Config::cols ? sm90::dq_tiles<Config>(p) : 0;
    std::vector<float> scratch(static_cast<size_t>(sums * (Config::rows * kHeadDim + Config::cluster)), NAN);
    p.dq_accum = scratch.empty() ? nullptr : scratch.data();

    emulated::random_numbers.seed(seed);
    sm90::launch_backward<bf16, kHeadDim, Mask, Config>(p, nullptr);

    std::vector<char> used_q(static_cast<size_t>(p.total_q), 0), used_k(static_cast<size_t>(p.total_k), 0);
    std::vector<double> want_q(p.total_q * c.heads * c.dim_qk, 0.0), want_k(p.total_k * c.heads * c.dim_qk, 0.0);
    std::vector<double> want_v(p.total_k * c.heads * c.dim_v, 0.0);
    std::vector<double> want_position(position.size(), 0.0), want_time(time.size(), 0.0),
        sizes_position = want_position, sizes_time = want_time;
    for (int b = 0; b < p.batch; ++b) {
        const Sequence s(p, b);
        for (int h = 0; h < c.heads; ++h) {
            const Mask mask(p, s, b, h);
            for (int j = 0; j < s.len_k; ++j) used_k[s.k_begin + j] = 1;
            for (int i = 0; i < s.len_q; ++i) {
                const int64_t row = s.q_begin + i;
                used_q[row] = 1;
                for (int j = 0; j < s.len_k; ++j) {
                    if (!mask.keep(i, j)) continue;
                    const int64_t key = s.k_begin + j;
                    double x = 0, dp = 0;
                    for (int d = 0; d < c.dim_qk; ++d)
                        x += static_cast<float>(q.at(row, h, d)) * static_cast<float>(k.at(key, h, d));
                    for (int d = 0; d < c.dim_v; ++d)
                        dp += static_cast<float>(dout.at(row, h, d)) * static_cast<float>(v.at(key, h, d));
                    x *= p.alpha;
                    size_t at_position = 0, at_time = 0;
                    if (of_position) {
                        const int distance = clamp_to(i + s.len_k - s.len_q - j, -c.reach, c.reach);
                        at_position = static_cast<size_t>(h % tables * positions + c.reach + distance);
                        x += position[at_position];
                    }
                    if (of_time) {
                        const int bucket = time_bucket(time_difference(query_times[row], key_times[key]));
                        at_time = static_cast<size_t>(h % tables * buckets + std::min(bucket, c.num_buckets));
                        x += time[at_time];
                    }
                    const double sigmoid = 1 / (1 + std::exp(-x)), weight = x * sigmoid * p.inv_scaling;
                    const double of_score = sigmoid * (1 + x * (1 - sigmoid)) * p.inv_scaling * dp;
                    const double g = p.alpha * of_score;
                    if (of_position)
                        want_position[at_position] += of_score,
                            sizes_position[at_position] += std::abs(dp) * p.inv_scaling;
                    if (of_time) want_time[at_time] += of_score, sizes_time[at_time] += std::abs(dp) * p.inv_scaling;
                    for (int d = 0; d < c.dim_qk; ++d) {
                        want_q[(row * c.heads + h) * c.dim_qk + d] += g * static_cast<float>(k.at(key, h, d));
                        want_k[(key * c.heads + h) * c.dim_qk + d] += g * static_cast<float>(q.at(row, h, d));
                    }
                    for (int d = 0; d < c.dim_v; ++d)
                        want_v[(key * c.heads + h) * c.dim_v + d] += weight * static_cast<float>(dout.at(row, h, d));
                }
            }
        }
    }
    compare(c, "dq", p, dq, want_q, used_q, p.total_q, c.dim_qk);
    compare(c, "dk", p, dk, want_k, used_k, p.total_k, c.dim_qk);
    compare(c, "dv", p, dv, want_v, used_k, p.total_k, c.dim_v);
    compare_table(c, "dposition", dposition, want_position, sizes_position);
    compare_table(c, "dtime", dtime, want_time, sizes_time);
    std::vector<uint16_t> bits;
    for (const std::vector<float>* table : {&dposition, &dtime})
        for (const float& x : *table)
            for (int part = 0; part < 2; ++part) bits.push_back(reinterpret_cast<const uint16_t*>(&x)[part]);
    for (const Packed* x : {&dq, &dk, &dv})
        for (const bf16& value : x->values) bits.push_back(value.bits);
    return bits;
}

const std::vector<Case> kWindowCases = {
    {"causal", {300, 1, 129, 0, 64, 200}, {300, 1, 129, 0, 64, 200}},
    {"equal", {130, 130, 130}, {130, 130, 130}},
    {"full", {200, 70}, {200, 70}, 1, -1, -1},
    {"window", {400, 33}, {400, 33}, 1, 60, 20},
    {"delta_q", {70, 1, 130}, {300, 90, 131}, 2, 100, 0},
    {"more_queries", {150, 90, 260}, {40, 0, 128}, 1},
    {"used", {200, 64, 129}, {200, 64, 129}, 2, -1, 0, {150, 0, 129}, {190, 10, 129}, {}, {}, 1, 3, 70},
};
const std::vector<Case> kTargetCases = {
    {"targets", {300, 130, 65, 1}, {300, 130, 65, 1}, 2, -1, 0, {}, {}, {3, 130, 0, 0}, {150, 0, 65, 1}, 7},
    {"target_delta_q", {90, 130}, {300, 130}, 1, -1, 0, {}, {}, {9, 0}, {60, 20}, 1},
    {"target_more_queries", {150, 100}, {60, 3}, 1, -1, 0, {}, {}, {0, 2}, {20, 0}, 3},
};

const std::vector<Case> kRelativeCases = [] {
    using Times = Case::Times;
    std::vector<Case> cases;
    const auto add = [&](Case c, const char* name, Times times, int reach, int num_buckets, bool table_per_head) {
        c.name = name, c.times = times, c.reach = reach, c.num_buckets = num_buckets, c.table_per_head = table_per_head;
        cases.push_back(c);
    };
    const Case causal{"", {200, 1, 129, 0, 70}, {200, 1, 129, 0, 70}},
        &full = kWindowCases[2], &window = kWindowCases[3], &delta_q = kWindowCases[4];
    const Case &more_queries = kWindowCases[5], &used = kWindowCases[6];
    add(causal, "relative", Times::kRising, 400, 64, false);
    add(causal, "relative_positions", Times::kNone, 50, 0, true);
    add(causal, "relative_times", Times::kRising, -1, 128, true);
    add(causal, "relative_milliseconds", Times::kMilliseconds, 0, 128, false);
    add(causal, "relative_shuffled", Times::kShuffled, 100, 64, false);
    add(causal, "relative_extreme", Times::kExtreme, 130, 147, false);
    add(full, "relative_full", Times::kRising, 64, 64, true);
    add(full, "relative_full_tied", Times::kTied, 10, 20, false);
    add(full, "relative_full_extreme", Times::kExtreme, 10, 300, false);
    add(window, "relative_window", Times::kRising, 40, 30, false);
    add(delta_q, "relative_delta_q", Times::kTied, 130, 64, true);
    add(more_queries, "relative_more_queries", Times::kRising, 100, 64, false);
    add(used, "relative_used", Times::kRising, 100, 0, true);
    return cases;
}();

template <class Mask>
void check_once(const Case& c) {
    emulated::late = c.reach % 20 != 0;
    emulated::multiprocessor_count = 3;
    check<HEAD_DIM, Mask, sm90::TILE<HEAD_DIM>>(c, 8, false);
}

template <class Mask>
void check_orders(const Case& c) {
    using Config = sm90::TILE<HEAD_DIM>;
    std::vector<uint16_t> bits;
    for (const bool late : {false, true}) {
        emulated::late = late;
        emulated::multiprocessor_count = late ? 4 : 1;
        check<HEAD_DIM, Mask, Config>(c, 8, false);
        const auto again = check<HEAD_DIM, Mask, Config>(c, 18, true);
        if (late && bits != again) emulated::fail(std::string(c.name) + ": other bits in another order");
        bits = again;
    }
}

}  // namespace

int main() {
    if (RELATIVE) {
        for (Case c : kRelativeCases) c.dim_qk = DIM_QK, c.dim_v = DIM_V, check_once<WindowMask>(c);
        for (Case c : kTargetCases) c.dim_qk = DIM_QK, c.dim_v = DIM_V, c.reach = 90, check_once<TargetMask>(c);
        std::printf("d%d, relative bias: ok\n", HEAD_DIM);
        return 0;
    }
    for (Case c : kWindowCases) c.dim_qk = DIM_QK, c.dim_v = DIM_V, check_orders<WindowMask>(c);
    for (Case c : kTargetCases) c.dim_qk = DIM_QK, c.dim_v = DIM_V, check_orders<TargetMask>(c);
    std::printf("d%d: ok\n", HEAD_DIM);
    return 0;
}
