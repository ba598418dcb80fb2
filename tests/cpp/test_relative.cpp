// sm80/relative.h, relative_gradient.h and exact_sum.h on the host: each tile of a warp against the definition, pair by
// pair, over every path of the time buckets, and the sums of the gradients against sums over pairs.
#include "attention/gpu.h"
//
#include <algorithm>
#include <array>
#include <random>

#include "attention/sm80/relative_gradient.h"

using hstu::clamp_to;
using namespace hstu::attention;
using namespace hstu::attention::sm80;

namespace {

#define REQUIRE(condition, ...)                                   \
    do {                                                          \
        if (!(condition)) {                                       \
            std::printf("line %d: %s\n  ", __LINE__, #condition); \
            std::printf(__VA_ARGS__);                             \
            std::printf("\n");                                    \
            std::exit(1);                                         \
        }                                                         \
    } while (false)

template <int kRowBlocks, int kColBlocks, int kRow, int kCol>
struct Grid {
    static constexpr int kM = kRowBlocks, kN = kColBlocks;
    static int row() { return kRow; }
    static int col() { return kCol; }
};

template <int kRowBlocks>
struct Piece {
    static constexpr int kM = kRowBlocks, kN = 2;
    float x[kM][kN][4];
};

struct Problem {
    std::vector<int64_t> query_times, key_times;
    std::vector<float> position, time;
    BackwardParams p;
    int64_t offsets_q[2], offsets_k[2];

    Problem(int len_q, int len_k, int reach, int num_buckets, int heads) {
        query_times.resize(len_q);
        key_times.resize(len_k);
        position.resize(heads * (2 * reach + 1));
        time.resize(heads * (num_buckets + 1));
        offsets_q[0] = offsets_k[0] = 0;
        offsets_q[1] = len_q, offsets_k[1] = len_k;
        p.batch = 1, p.heads = heads;
        p.total_q = p.max_seqlen_q = len_q;
        p.total_k = p.max_seqlen_k = len_k;
        p.cu_seqlens_q = {offsets_q, true};
        p.cu_seqlens_k = {offsets_k, true};
        p.relative = {position.data(),    reach,           heads > 1 ? 2 * reach + 1 : 0,
                      time.data(),        num_buckets,     heads > 1 ? num_buckets + 1 : 0,
                      query_times.data(), key_times.data()};
        p.inv_scaling = 0.25f;
    }

    float position_at(int head, int i, int j) const {
        const Relative& r = p.relative;
        const int offset = static_cast<int>(key_times.size()) - static_cast<int>(query_times.size());
        return position[head * r.position_head_stride + r.reach + clamp_to(i + offset - j, -r.reach, r.reach)];
    }
    int bucket_at(int i, int j) const {
        return std::min(time_bucket(time_difference(query_times[i], key_times[j])), p.relative.num_buckets);
    }
};

std::mt19937_64 generator(0);
double uniform() { return std::uniform_real_distribution<>(0, 1)(generator); }
int integer(int from, int to) { return std::uniform_int_distribution<>(from, to)(generator); }

// Fills times by kind; one sequence of times serves both sides, the queries one place later.
void fill_times(Problem& problem, int kind) {
    const size_t count = std::max(problem.query_times.size(), problem.key_times.size()) + 1;
    std::vector<int64_t> t(count);
    int64_t now = 1600000000;
    for (int64_t& x : t) {
        now += uniform() < 0.2 ? 0 : static_cast<int64_t>(std::exp(uniform() * 14));
        switch (kind) {
            case 0: x = now; break;                                                          // ascending seconds
            case 1: x = now * 1000 + integer(0, 999); break;                                 // milliseconds
            case 2: x = integer(-6, 6); break;                                               // small
            case 3: x = 77; break;                                                           // equal
            case 4: x = static_cast<int64_t>(generator()); break;                            // all of int64
            case 5: x = 1600000000 + static_cast<int64_t>(std::exp(uniform() * 20)); break;  // unordered
            case 6: x = static_cast<int64_t>(generator()) >> integer(0, 63); break;          // of all sizes
            default: x = uniform() < 0.5 ? INT64_MIN + integer(0, 2) : INT64_MAX - integer(0, 2);
        }
    }
    if (kind >= 8) {  // ascending, and edges of buckets from the first time
        for (size_t n = 0; n < count; ++n)
            t[n] = -5000 + static_cast<int64_t>(kTimeEdges[n % (kind == 8 ? 70 : 140)]) + integer(-1, 1);
        t[0] = -5000;
        if (kind == 8) std::sort(t.begin(), t.end());
    }
    for (size_t j = 0; j < problem.key_times.size(); ++j) problem.key_times[j] = t[j];
    for (size_t i = 0; i < problem.query_times.size(); ++i)
        problem.query_times[i] = t[count - problem.query_times.size() + i];
}

std::array<int, 4> paths{};  // one bucket, a few edges, look-ups in 32 bits, in 64 bits

template <class G, bool kRowsStay>
void check_tile(Problem& problem, int head, int row0, int col0) {
    const int len_q = static_cast<int>(problem.query_times.size()), len_k = static_cast<int>(problem.key_times.size());
    const Sequence sequence(problem.p, 0);
    using Tiles = RelativeTiles<G, kRowsStay>;
    using STile = Tile<64, G::kN == 2 ? 32 : 64>;
    constexpr int kRows = G::kM * 16, kCols = G::kN * 8;
    std::vector<float> score(kRows * kCols), grad(kRows * kCols), got(kRows * kCols), looked_up(kRows * kCols);
    for (float& x : score) x = static_cast<float>(uniform() - 0.5);
    // Sums of small integers and quarters of them have no rounding; sums of others must still be 0 where nothing is added.
    const bool round = integer(0, 1) != 0;
    const float unit = round ? 1.0f : 0.1f, tolerance = round ? 0.0f : 0.01f;
    for (int r = 0; r < kRows; ++r)
        for (int c = 0; c < kCols; ++c) {
            const bool inside = row0 + G::row() + r < len_q && col0 + G::col() + c < len_k;
            grad[r * kCols + c] = inside && uniform() < 0.9 ? unit * static_cast<float>(integer(-64, 64)) : 0.0f;
        }

    BackwardParams& p = problem.p;
    std::vector<float> dposition(problem.position.size()), dtime(problem.time.size());
    std::vector<int64_t> words((dposition.size() + dtime.size()) * kExactWords);
    p.dposition = problem.p.relative.position ? dposition.data() : nullptr;
    p.dtime = problem.p.relative.time ? dtime.data() : nullptr;
    p.dposition_head_stride = p.relative.position_head_stride;
    p.dtime_head_stride = p.relative.time_head_stride;
    const bool exact = integer(0, 1) != 0;
    p.table_accum = words.data();
    p.deterministic = exact;
    const int copy = integer(0, kTableCopies - 1);

    warp_on_host::run([&] {
        const Tiles tiles(p, sequence, 0, head, kRowsStay ? row0 : col0);
        const auto place = [&](int m, int n, int e) {
            return (m * 16 + e / 2 * 8 + lane() / 4) * kCols + n * 8 + lane() % 4 * 2 + e % 2;
        };
        const TableGradients gradients(p, head, copy);
        TimeSums sums;
        const auto times = tiles.times_of(row0, col0);
        // As in differentiate_piece(), and without gradients beside it.
        for (int piece = 0; piece < Tiles::kPieces; ++piece) {
            Piece<G::kM> s, g;
            float of_piece[Tiles::kPieceSize];
            const auto place_of = [&](int i) {
                return place(Tiles::m(i), 2 * piece + Tiles::n(i), Tiles::half(i) * 2 + Tiles::c(i));
            };
            for (int i = 0; i < Tiles::kPieceSize; ++i) {
                s.x[Tiles::m(i)][Tiles::n(i)][Tiles::half(i) * 2 + Tiles::c(i)] = score[place_of(i)];
                of_piece[i] = grad[place_of(i)];
                g.x[Tiles::m(i)][Tiles::n(i)][Tiles::half(i) * 2 + Tiles::c(i)] = of_piece[i];
            }
            const auto of_tables = tiles.piece(times, piece, row0, col0);
            const PieceBuckets& in = of_tables.in;
            if (lane() == 0)
                ++paths[in.first == in.last ? 0 : in.wide ? 3 : in.last - in.first <= Tiles::kMaxEdges ? 1 : 2];
            int bucket[Tiles::kPieceSize];
            tiles.template add<false>(s, 0, of_tables, times, row0, col0, 0.75f, bucket);
            for (int i = 0; i < Tiles::kPieceSize; ++i)
                got[place_of(i)] = s.x[Tiles::m(i)][Tiles::n(i)][Tiles::half(i) * 2 + Tiles::c(i)];
            // The other way to the same bias: no edges are compared.
            for (int i = 0; i < Tiles::kPieceSize; ++i)
                s.x[Tiles::m(i)][Tiles::n(i)][Tiles::half(i) * 2 + Tiles::c(i)] = score[place_of(i)];
            tiles.template add<true>(s, 0, of_tables, times, row0, col0, 0.75f, bucket);
            for (int i = 0; i < Tiles::kPieceSize; ++i)
                looked_up[place_of(i)] = s.x[Tiles::m(i)][Tiles::n(i)][Tiles::half(i) * 2 + Tiles::c(i)];
            const BucketColumns<STile, G::kM> columns(STile{0}, G::row(), G::col() + piece * 16);
            if (gradients.time != nullptr) sums.add_piece(in, of_piece, bucket, columns);
            add_distances(g, gradients, row0 + G::row() + tiles.offset - col0 - G::col() - piece * 16, tiles.reach);
        }
        sums.flush(gradients, tiles.num_buckets);
    });

    std::vector<double> position(dposition.size()), time(dtime.size());
    std::vector<int> position_terms(position.size()), time_terms(time.size());
    const float* sums = reinterpret_cast<const float*>(words.data()) +
                        copy * (TableGradients::position_entries(p) + TableGradients::time_entries(p));
    for (int r = 0; r < kRows; ++r)
        for (int c = 0; c < kCols; ++c) {
            const int i = row0 + G::row() + r, j = col0 + G::col() + c;
            if (i >= len_q || j >= len_k) continue;
            float bias = 0.0f;
            if (p.relative.position) bias += problem.position_at(head, i, j);
            const float time_bias =
                p.relative.time ? problem.time[head * p.relative.time_head_stride + problem.bucket_at(i, j)] : 0.0f;
            bias += time_bias;
            const float expected = 0.75f * score[r * kCols + c] + 0.5f * bias;
            for (float result : {got[r * kCols + c], looked_up[r * kCols + c]})
                REQUIRE(std::fabs(result - expected) <= 1e-3f, "row %d key %d: %g, expected %g", i, j, result,
                        expected);
            const int offset = len_k - len_q, reach = p.relative.reach;
            const float g = grad[r * kCols + c];
            if (p.relative.position) {
                const int64_t at = head * p.dposition_head_stride + reach + clamp_to(i + offset - j, -reach, reach);
                position[at] += g, position_terms[at] += g != 0.0f;
            }
            if (p.relative.time) {
                const int64_t at = head * p.dtime_head_stride + problem.bucket_at(i, j);
                time[at] += g, time_terms[at] += g != 0.0f;
            }
        }
    const auto agrees = [&](float sum, double expected, int terms) {
        return terms == 0 ? sum == 0.0f : std::fabs(sum - 0.25 * expected) <= tolerance;
    };
    const size_t first_time = p.relative.position ? position.size() : 0;
    for (size_t n = 0; p.relative.position && n < position.size(); ++n) {
        const float sum = exact ? exact_sum(&words[n * kExactWords]) : sums[n];
        REQUIRE(agrees(sum, position[n], position_terms[n]), "position %zu: %g, expected %g", n, sum,
                0.25 * position[n]);
    }
    for (size_t n = 0; p.relative.time && n < time.size(); ++n) {
        const float sum = exact ? exact_sum(&words[(first_time + n) * kExactWords]) : sums[first_time + n];
        REQUIRE(agrees(sum, time[n], time_terms[n]), "bucket %zu: %g, expected %g", n, sum, 0.25 * time[n]);
    }
}

template <class G>
void check_tiles(int tiles) {
    for (int n = 0; n < tiles; ++n) {
        const int kind = n % 10, heads = integer(1, 2);
        const int len_q = integer(1, 150), len_k = integer(1, 300);
        Problem problem(len_q, len_k, n % 3 ? integer(0, 100) : 400, n % 4 ? 147 : integer(0, 160), heads);
        fill_times(problem, kind);
        // Buckets differ by 2: a neighbour's value is far off.
        for (size_t b = 0; b < problem.time.size(); ++b) problem.time[b] = 2.0f * static_cast<float>(b);
        for (float& x : problem.position) x = static_cast<float>(integer(-1000, 1000)) * 3.0f;
        if (n % 7 == 0) problem.p.relative.position = nullptr;
        if (n % 7 == 1) problem.p.relative.time = nullptr;
        const int row0 = integer(0, (len_q - 1) / 16) * 16, col0 = integer(0, len_k - 1);
        check_tile<G, true>(problem, heads - 1, row0, col0);
        check_tile<G, false>(problem, 0, row0, col0);
    }
}

void check_exact_sums() {
    std::vector<float> terms;
    for (int n = 0; n < 3000; ++n) terms.push_back(std::ldexp(static_cast<float>(uniform() - 0.5), integer(-148, 120)));
    for (float x : std::vector<float>(terms)) terms.push_back(-x);
    for (float x : {0x1p-149f, -0x1p-126f, 0x1.8p-10f, 0x1p127f, -0x1p127f, 0.0f, 3.0f}) terms.push_back(x);
    for (int order = 0; order < 4; ++order) {
        std::shuffle(terms.begin(), terms.end(), generator);
        int64_t words[kExactWords] = {};
        for (float x : terms) add_exactly(words, x);
        REQUIRE(exact_sum(words) == 3.0f + 0x1.8p-10f, "%a", exact_sum(words));
        add_exactly(words, -3.0f - 0x1p-5f);
        REQUIRE(exact_sum(words) == 0x1.8p-10f - 0x1p-5f, "%a", exact_sum(words));
        add_exactly(words, -0x1.8p-10f);
        add_exactly(words, 0x1p-5f);
        REQUIRE(exact_sum(words) == 0x1p-149f - 0x1p-126f, "%a", exact_sum(words));
    }
    for (float wild : {INFINITY, -INFINITY, NAN}) {
        int64_t words[kExactWords] = {};
        add_exactly(words, 1.0f);
        add_exactly(words, wild);
        REQUIRE(std::isnan(exact_sum(words)), "%a", exact_sum(words));
    }
}

}  // namespace

int main() {
    check_tiles<Grid<2, 8, 32, 0>>(200);  // forward, 128 x 64
    check_tiles<Grid<1, 8, 16, 0>>(100);  // forward, 64 x 64
    check_tiles<Grid<2, 4, 0, 32>>(200);  // backward, 64 x 64; forward with two warps sharing rows
    check_tiles<Grid<1, 4, 48, 0>>(100);
    check_tiles<Grid<1, 2, 16, 16>>(100);  // the smallest of small GPUs
    for (int path = 0; path < 4; ++path) REQUIRE(paths[path] > 100, "path %d: %d pieces", path, paths[path]);
    check_exact_sums();
    std::printf("pieces: %d of one bucket, %d with few edges, %d looked up in 32 bits, %d in 64\n", paths[0], paths[1],
                paths[2], paths[3]);
    return 0;
}
