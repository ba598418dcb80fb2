// Schedule and PlaceFinder on the host: the places are all row blocks once each, and blocks get even shares of the work.
#include "emulator.h"

#include "attention/sm90/schedule.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <random>
#include <vector>

using hstu::ceil_div;
using hstu::attention::Params;
using hstu::attention::sm90::PlaceFinder;
using hstu::attention::sm90::Schedule;
using hstu::attention::sm90::SortedBatch;

namespace {

// As SortedBatch::sort does on the GPU.
void sort(SortedBatch& batch, const std::vector<int>& lengths, int rows, int levels) {
    std::vector<int> order(lengths.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int a, int b) { return ceil_div(lengths[a], rows) > ceil_div(lengths[b], rows); });
    std::copy(order.begin(), order.end(), batch.sequences);
    batch.blocks_from[levels] = 0;
    for (int level = levels - 1; level >= 0; --level) {
        const auto has_level = [&](int n) { return ceil_div(n, rows) > level; };
        batch.blocks_from[level] =
            batch.blocks_from[level + 1] + static_cast<int>(std::count_if(lengths.begin(), lengths.end(), has_level));
    }
}

// most: the largest share of one block over the mean, under a causal mask.
bool check(const std::vector<int>& lengths, int heads, int rows, int blocks, double most) {
    Params p;
    p.batch = static_cast<int>(lengths.size());
    p.heads = heads;
    p.max_seqlen_q = *std::max_element(lengths.begin(), lengths.end());
    p.total_q = std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
    const Schedule schedule(p, rows, blocks);
    SortedBatch batch;
    if (schedule.sorted) sort(batch, lengths, rows, schedule.levels);

    const int pairs = p.batch * heads;
    std::vector<char> seen(static_cast<size_t>(pairs) * schedule.levels, 0);
    std::vector<double> load(blocks, 0);
    int found = 0;
    for (int block = 0; block < blocks; ++block) {
        PlaceFinder find(schedule, batch);
        for (int round = 0; Schedule::place(round, block, blocks) < find.last(); ++round) {
            const auto [b, head, level] = find(Schedule::place(round, block, blocks));
            if (b < 0 || b >= p.batch || head < 0 || head >= heads || level < 0 || level >= schedule.levels ||
                seen[(static_cast<size_t>(b) * heads + head) * schedule.levels + level]++) {
                std::printf("%d sequences up to %d, %d heads: block %d round %d is (%d, %d, %d)\n", p.batch,
                            p.max_seqlen_q, heads, block, round, b, head, level);
                return false;
            }
            if (level * rows >= lengths[b]) continue;
            ++found;
            load[block] += 1 + level;
        }
        if (find(1 << 30).level >= 0) return std::printf("a place behind the last one\n"), false;
    }
    int expected = 0;
    for (int n : lengths) expected += heads * ceil_div(n, rows);
    const double mean = std::accumulate(load.begin(), load.end(), 0.0) / blocks;
    const double share = *std::max_element(load.begin(), load.end()) / mean;
    if (found == expected && (most == 0 || share <= most)) return true;
    std::printf("%d sequences up to %d, %d heads, %d blocks: %d of %d row blocks, largest share %.3f\n", p.batch,
                p.max_seqlen_q, heads, blocks, found, expected, share);
    return false;
}

}  // namespace

int main() {
    for (int rows : {128, 192})
        for (const auto& [length, batch] : {std::pair{1024, 32}, {2048, 16}, {4096, 8}, {8192, 8}, {16384, 4}})
            if (!check(std::vector<int>(batch, length), 4, rows, 132, 1.12)) return 1;

    std::mt19937 random(0);
    const auto ragged = [&](int longest, int batch) {
        std::vector<int> lengths(batch, longest);
        std::uniform_real_distribution<double> x(0, 1);
        for (int b = 1; b < batch; ++b) lengths[b] = std::max(1, static_cast<int>(longest * std::pow(x(random), 3)));
        return lengths;
    };
    for (int rows : {128, 192})
        for (int i = 0; i < 5; ++i)
            for (const auto& [longest, batch] : {std::pair{1024, 256}, {4096, 128}, {8192, 64}})
                if (!check(ragged(longest, batch), 4, rows, 132, 1.12)) return 1;

    // Anything: few blocks, many, lengths of 0, batches too large to be sorted.
    for (int i = 0; i < 300; ++i) {
        const int batch = 1 + static_cast<int>(random() % 40), longest = 1 + static_cast<int>(random() % 3000);
        std::vector<int> lengths(batch);
        for (int& n : lengths) n = static_cast<int>(random() % (longest + 1));
        if (i % 3 == 0) std::fill(lengths.begin(), lengths.end(), longest);
        if (!check(lengths, 1 + static_cast<int>(random() % 5), 64 << (random() % 3), 1 + random() % 200, 0)) return 1;
    }
    return check(ragged(700, 513), 2, 128, 132, 0) && check(std::vector<int>(3, 40000), 1, 64, 132, 0) ? 0 : 1;
}
