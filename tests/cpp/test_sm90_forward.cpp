// sm90/forward.h on the emulator against the definition: masks, ragged batches, every tile, early and late copies.
#include "emulator.h"

#include "attention/sm90/forward.h"

#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

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

template <int kHeadDim, class Mask, class Config>
void check(const Case& c, unsigned seed) {
    const std::vector<int> cu_q = offsets_of(c.lengths_q, c.before), cu_k = offsets_of(c.lengths_k, c.before);
    Params p;
    p.batch = static_cast<int>(c.lengths_q.size());
    p.heads = c.heads;
    p.dim_qk = c.dim_qk, p.dim_v = c.dim_v;
    p.total_q = cu_q.back() + c.after, p.total_k = cu_k.back() + c.after;
    p.max_seqlen_q = *std::max_element(c.lengths_q.begin(), c.lengths_q.end());
    p.max_seqlen_k = *std::max_element(c.lengths_k.begin(), c.lengths_k.end());
    p.alpha = 0.2f, p.inv_scaling = 1.0f / 64;
    p.cu_seqlens_q = {cu_q.data(), false}, p.cu_seqlens_k = {cu_k.data(), false};
    const auto array = [](const std::vector<int>& x) { return IndexArray{x.empty() ? nullptr : x.data(), false}; };
    p.seqused_q = array(c.used_q), p.seqused_k = array(c.used_k);
    p.num_contexts = array(c.contexts), p.num_targets = array(c.targets);
    p.target_group_size = c.group, p.window_left = c.window_left, p.window_right = c.window_right;

    Packed q(p.total_q, c.heads, c.dim_qk, NAN), k(p.total_k, c.heads, c.dim_qk, NAN);
    Packed v(p.total_k, c.heads, c.dim_v, NAN), out(p.total_q, c.heads, c.dim_v, NAN);
    p.q = q.view, p.k = k.view, p.v = v.view, p.out = out.view;
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (int b = 0; b < p.batch; ++b) {
        const Sequence s(p, b);
        for (int h = 0; h < c.heads; ++h) {
            for (int i = 0; i < s.len_q; ++i)
                for (int d = 0; d < c.dim_qk; ++d) q.at(s.q_begin + i, h, d) = bf16(normal(random));
            for (int j = 0; j < s.len_k; ++j) {
                for (int d = 0; d < c.dim_qk; ++d) k.at(s.k_begin + j, h, d) = bf16(normal(random));
                for (int d = 0; d < c.dim_v; ++d) v.at(s.k_begin + j, h, d) = bf16(normal(random));
            }
        }
    }

    emulated::random_numbers.seed(seed);
    sm90::launch_forward<bf16, kHeadDim, Mask, Config>(p, nullptr);

    std::vector<char> used(static_cast<size_t>(p.total_q), 0);
    double error = 0, norm = 0;
    for (int b = 0; b < p.batch; ++b) {
        const Sequence s(p, b);
        for (int h = 0; h < c.heads; ++h) {
            const Mask mask(p, s, b, h);
            for (int i = 0; i < s.len_q; ++i) {
                used[s.q_begin + i] = 1;
                std::vector<double> expected(c.dim_v, 0.0);
                double row_error = 0, row_norm = 0;
                for (int j = 0; j < s.len_k; ++j) {
                    if (!mask.keep(i, j)) continue;
                    double x = 0;
                    for (int d = 0; d < c.dim_qk; ++d)
                        x += static_cast<float>(q.at(s.q_begin + i, h, d)) *
                             static_cast<float>(k.at(s.k_begin + j, h, d));
                    x *= p.alpha;
                    const double weight = x / (1 + std::exp(-x)) * p.inv_scaling;
                    for (int d = 0; d < c.dim_v; ++d)
                        expected[d] += weight * static_cast<float>(v.at(s.k_begin + j, h, d));
                }
                for (int d = 0; d < c.dim_v; ++d) {
                    const double got = static_cast<float>(out.at(s.q_begin + i, h, d));
                    row_error += (got - expected[d]) * (got - expected[d]), row_norm += expected[d] * expected[d];
                }
                error += row_error, norm += row_norm;
                if (!(std::sqrt(row_error) <= 0.02 * std::sqrt(row_norm)))
                    emulated::fail(std::string(c.name) + ": sequence " + std::to_string(b) + " head " +
                                   std::to_string(h) + " row " + std::to_string(i) + " is wrong");
            }
        }
    }
    if (!(std::sqrt(error) <= 4e-3 * std::sqrt(norm))) emulated::fail(std::string(c.name) + ": inaccurate");
    for (int64_t row = 0; row < p.total_q; ++row)
        for (int h = 0; h < c.heads && !used[row]; ++h)
            for (int d = 0; d < c.dim_v; ++d)
                if (out.at(row, h, d).bits != 0) emulated::fail(std::string(c.name) + ": an unused row is not 0");
    for (int64_t row = 0; row < p.total_q; ++row)  // the gap between heads
        for (int h = 0; h < c.heads; ++h)
            for (int d = c.dim_v; d < c.dim_v + 8; ++d)
                if (!std::isnan(static_cast<float>(out.at(row, h, d))))
                    emulated::fail(std::string(c.name) + ": written outside the output");
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
};

template <int kHeadDim, class Config>
void check_tile(int dim_qk, int dim_v) {
    for (bool late : {false, true}) {
        emulated::late = late;
        emulated::multiprocessor_count = late ? 4 : 1;
        for (Case c : kWindowCases) {
            c.dim_qk = dim_qk, c.dim_v = dim_v;
            check<kHeadDim, WindowMask, Config>(c, 7 + late);
        }
        for (Case c : kTargetCases) {
            c.dim_qk = dim_qk, c.dim_v = dim_v;
            check<kHeadDim, TargetMask, Config>(c, 9 + late);
        }
    }
}

}  // namespace

// One tile a program: HEAD_DIM, TILE (a row of the tile table), DIM_QK, DIM_V.
int main() {
    check_tile<HEAD_DIM, sm90::TILE<HEAD_DIM>>(DIM_QK, DIM_V);
    return 0;
}
