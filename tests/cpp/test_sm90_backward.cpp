// sm90/backward.h on the emulator against the definition: masks, ragged batches, every tile, blocks that wait for one
// another, early and late copies and products, and the same bits whatever the order where that is promised.
#include "emulator.h"

#include "attention/sm90/backward.h"

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
    int reach = 1000;  // of the position table, with RELATIVE
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
    const int tables = c.table_per_head ? c.heads : 1, entries = RELATIVE ? 2 * c.reach + 1 : 0;
    std::vector<float> position(static_cast<size_t>(tables * entries)), dposition(position.size(), NAN);
    for (float& x : position) x = 0.5f * normal(random);
    std::vector<int64_t> table_accum(position.size() * kExactWords, 0);
    if (RELATIVE) {
        p.relative.position = position.data(), p.relative.reach = c.reach, p.dposition = dposition.data();
        if (c.table_per_head) p.relative.position_head_stride = p.dposition_head_stride = entries;
        p.table_accum = table_accum.data();
    }
    // For this tile: dq_scratch_elements() asks for the one that serves such a batch, which may be another.
    const int64_t sums = p.max_seqlen_k > Config::cluster * Config::cols ? sm90::dq_tiles<Config>(p) : 0;
    std::vector<float> scratch(static_cast<size_t>(sums * (Config::rows * kHeadDim + Config::cluster)), NAN);
    p.dq_accum = scratch.empty() ? nullptr : scratch.data();

    emulated::random_numbers.seed(seed);
    sm90::launch_backward<bf16, kHeadDim, Mask, Config>(p, nullptr);

    std::vector<char> used_q(static_cast<size_t>(p.total_q), 0), used_k(static_cast<size_t>(p.total_k), 0);
    std::vector<double> want_q(p.total_q * c.heads * c.dim_qk, 0.0), want_k(p.total_k * c.heads * c.dim_qk, 0.0);
    std::vector<double> want_v(p.total_k * c.heads * c.dim_v, 0.0);
    std::vector<double> want_position(position.size(), 0.0), sizes_position = want_position;
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
                    size_t entry = 0;
                    if (RELATIVE) {
                        const int distance = clamp_to(i + s.len_k - s.len_q - j, -c.reach, c.reach);
                        entry = static_cast<size_t>(h % tables * entries + c.reach + distance);
                        x += position[entry];
                    }
                    const double sigmoid = 1 / (1 + std::exp(-x)), weight = x * sigmoid * p.inv_scaling;
                    const double of_score = sigmoid * (1 + x * (1 - sigmoid)) * p.inv_scaling * dp;
                    const double g = p.alpha * of_score;
                    if (RELATIVE)
                        want_position[entry] += of_score, sizes_position[entry] += std::abs(dp) * p.inv_scaling;
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
    std::vector<uint16_t> bits;
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
    std::vector<Case> cases;
    const auto add = [&](Case c, const char* name, int reach, bool table_per_head) {
        c.name = name, c.reach = reach, c.table_per_head = table_per_head;
        cases.push_back(c);
    };
    const Case causal{"", {200, 1, 129, 0, 70}, {200, 1, 129, 0, 70}},
        &full = kWindowCases[2], &window = kWindowCases[3], &delta_q = kWindowCases[4];
    add(causal, "relative", 400, false);
    add(causal, "relative_heads", 50, true);
    add(causal, "relative_one", 0, false);
    add(causal, "relative_edge", 199, true);
    add(full, "relative_full", 64, true);
    add(full, "relative_full_short", 10, false);
    add(window, "relative_window", 40, false);
    add(delta_q, "relative_delta_q", 130, true);
    add(kWindowCases[5], "relative_more_queries", 100, false);
    add(kWindowCases[6], "relative_used", 100, true);
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
