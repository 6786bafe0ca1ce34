/*-------------------------------------------------------------------------
 *
 * mutator.c
 *	  Mutates a corpus at random, where there is no libFuzzer.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * test/fuzz/mutator.c
 *
 *-------------------------------------------------------------------------
 */
#include "fuzz.h"

#include <dirent.h>
#include <time.h>

#define INPUT_MAX 8192
#define CORPUS_MAX 4096

static uint64 random_state;

static uint32
random_below(uint32 n)
{
	random_state ^= random_state << 13;
	random_state ^= random_state >> 7;
	random_state ^= random_state << 17;
	return (uint32) ((random_state >> 16) % n);
}

static size_t
mutate(uint8 *data, size_t size, uint8 *const *corpus, const size_t *sizes, int ncorpus)
{
	int			changes = 1 + random_below(8);
	int			ntokens = 0;

	while (fuzz_tokens[ntokens] != NULL)
		ntokens++;

	while (changes-- > 0)
	{
		size_t		at = random_below(size + 1);
		const uint8 *add = NULL;
		size_t		len = 0;
		uint8		byte;

		switch (random_below(6))
		{
			case 0:
				if (size > 0)
					data[at % size] ^= 1 << random_below(8);
				break;
			case 1:
				if (size > 0)
					data[at % size] = random_below(256);
				break;
			case 2:				/* drop a part */
				if (size > 0)
				{
					at %= size;
					len = 1 + random_below(16);
					len = Min(len, size - at);
					memmove(data + at, data + at + len, size - at - len);
					size -= len;
				}
				continue;
			case 3:
				byte = random_below(256);
				add = &byte;
				len = 1;
				break;
			case 4:
				{
					const char *token = fuzz_tokens[random_below(ntokens)];

					add = (const uint8 *) token;
					len = strlen(token);
					break;
				}
			case 5:				/* a part of another input */
				{
					int			other = random_below(ncorpus);
					size_t		start = random_below(sizes[other] + 1);

					add = corpus[other] + start;
					len = sizes[other] - start;
					break;
				}
		}
		if (add != NULL && size + len <= INPUT_MAX)
		{
			memmove(data + at + len, data + at, size - at);
			memcpy(data + at, add, len);
			size += len;
		}
	}
	return size;
}

void
fuzz_at_random(FuzzTarget target, int seconds, const char *directory, uint64 seed)
{
	static uint8 *corpus[CORPUS_MAX];
	static size_t sizes[CORPUS_MAX];
	static uint8 data[INPUT_MAX];
	int			ncorpus = 0;
	long long	nruns = 0;
	time_t		end = time(NULL) + seconds;
	DIR		   *dir = opendir(directory);
	struct dirent *entry;

	random_state = seed;
	CHECK(random_state != 0 && dir != NULL);
	while ((entry = readdir(dir)) != NULL && ncorpus < CORPUS_MAX)
	{
		char		path[4096];
		FILE	   *file;

		if (entry->d_name[0] == '.')
			continue;
		snprintf(path, sizeof(path), "%s/%s", directory, entry->d_name);
		file = fopen(path, "rb");
		CHECK(file != NULL);
		sizes[ncorpus] = fread(data, 1, INPUT_MAX, file);
		fclose(file);
		corpus[ncorpus] = malloc(sizes[ncorpus] + 1);
		memcpy(corpus[ncorpus], data, sizes[ncorpus]);
		target(corpus[ncorpus], sizes[ncorpus]);
		ncorpus++;
	}
	closedir(dir);
	CHECK(ncorpus > 0);

	while (time(NULL) < end)
	{
		for (int i = 0; i < 1000; i++)
		{
			int			from = random_below(ncorpus);
			size_t		size = sizes[from];

			memcpy(data, corpus[from], size);
			size = mutate(data, size, corpus, sizes, ncorpus);
			target(data, size);
			nruns++;

			/* now and then a mutant becomes a parent */
			if (ncorpus < CORPUS_MAX && random_below(2000) == 0)
			{
				corpus[ncorpus] = malloc(size + 1);
				memcpy(corpus[ncorpus], data, size);
				sizes[ncorpus++] = size;
			}
		}
	}
	printf("%lld inputs, corpus of %d\n", nruns, ncorpus);
	fflush(stdout);
}

#ifdef STANDALONE

int			LLVMFuzzerTestOneInput(const uint8 *data, size_t size);

/* SECONDS DIRECTORY SEED */
int
main(int argc, char **argv)
{
	CHECK(argc == 4);
	fuzz_at_random(LLVMFuzzerTestOneInput, atoi(argv[1]), argv[2], strtoull(argv[3], NULL, 10));
	return 0;
}

#endif							/* STANDALONE */
