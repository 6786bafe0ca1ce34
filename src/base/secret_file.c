/*-------------------------------------------------------------------------
 *
 * secret_file.c
 *	  Files and environment variables that hold secrets.
 *
 * A secret is never the value of a setting: every role can read what ALTER
 * ROLE ... SET has set, and the server logs what a reload changes.  So a
 * setting names a file with one secret a line, or the postmaster's environment
 * holds the value.
 *
 * A file is read each time it is needed.  It is small, and so a new secret
 * counts from the next call on, with no cache that could be out of date.  It
 * must be what PostgreSQL demands of a server's private key: a regular file of
 * the server's user that nobody else can access, or one of root's that the
 * server's group may read.
 *
 * Errors name the file if everybody may see its name, and never quote it.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/base/secret_file.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "storage/fd.h"

#include "base/errors.h"
#include "base/secret_file.h"

#define SECRET_FILE_MAX_BYTES (16 * 1024)

/*
 * What is wrong with a secret: a sentence for an error's DETAIL, untranslated,
 * which never quotes it.  NULL if nothing is.
 */
const char *
secret_problem(const char *secret, size_t len)
{
	size_t		i;

	if (len == 0)
		return gettext_noop("It is empty.");
	for (i = 0; i < len; i++)
	{
		if (secret[i] <= ' ' || secret[i] > '~')
			return gettext_noop("It has a character that is not printable ASCII, or white space.");
	}
	return NULL;
}

/*
 * The secrets in a text, one a line, as a list of palloc'd C strings.  Empty
 * lines and white space at the ends of a line are skipped.
 */
static List *
split_lines(const char *text, const char *what)
{
	List	   *secrets = NIL;
	const char *p = text;

	for (;;)
	{
		const char *start;
		const char *end;

		while (*p == ' ' || *p == '\t' || *p == '\r' || *p == '\n')
			p++;
		if (*p == '\0')
			break;

		start = p;
		while (*p != '\0' && *p != '\n')
			p++;
		end = p;
		while (end[-1] == ' ' || end[-1] == '\t' || end[-1] == '\r')
			end--;

		if (secret_problem(start, end - start) != NULL)
			ereport(ERROR,
					(errcode(ERRCODE_CONFIG_FILE_ERROR),
					 errmsg("%s has a line that cannot be a secret", what),
					 errdetail_internal("%s", _(secret_problem(start, end - start)))));
		secrets = lappend(secrets, pnstrdup(start, end - start));
	}

	return secrets;
}

/*
 * Raise an error if anybody but the server and root can read a file.
 */
static void
check_file(int fd, const char *what)
{
	struct stat st;

	if (fstat(fd, &st) != 0)
		ereport(ERROR,
				(errcode_for_file_access(),
				 errmsg("could not stat %s: %m", what)));

	if (!S_ISREG(st.st_mode))
		ereport(ERROR,
				(errcode(ERRCODE_CONFIG_FILE_ERROR),
				 errmsg("%s is not a regular file", what)));

#if !defined(WIN32) && !defined(__CYGWIN__)
	if (st.st_uid != geteuid() && st.st_uid != 0)
		ereport(ERROR,
				(errcode(ERRCODE_CONFIG_FILE_ERROR),
				 errmsg("%s must be owned by the server's user or root", what)));
	if ((st.st_uid == geteuid() && (st.st_mode & (S_IRWXG | S_IRWXO)) != 0) ||
		(st.st_uid != geteuid() && (st.st_mode & (S_IWGRP | S_IXGRP | S_IRWXO)) != 0))
		ereport(ERROR,
				(errcode(ERRCODE_CONFIG_FILE_ERROR),
				 errmsg("%s can be accessed by others", what),
				 errdetail("It must have permissions 0600 or less if it belongs to the server's user, 0640 or less if to root."),
				 errhint("Set its permissions to 0600, and consider the secret in it known.")));
#endif
}

/*
 * Read a file that holds a secret into a buffer of this size, as a string.
 *
 * "what" is what messages call it.  Raises ERRCODE_CONFIG_FILE_ERROR, or the
 * error for the errno, if the file cannot be read, is not safe or is too large;
 * the buffer is wiped then.
 */
void
secret_file_load(const char *path, const char *what, char *buffer, size_t size)
{
	int			flags = O_RDONLY | PG_BINARY;
	size_t		len = 0;
	int			fd;

#ifdef O_NONBLOCK
	flags |= O_NONBLOCK;		/* do not wait for a FIFO */
#endif
#ifdef O_NOCTTY
	flags |= O_NOCTTY;
#endif

	fd = OpenTransientFile(path, flags);
	if (fd < 0)
		ereport(ERROR,
				(errcode_for_file_access(),
				 errmsg("could not open %s: %m", what),
				 errhint("The server opens it, as its own user and on its own machine.")));
	check_file(fd, what);

	while (len < size)
	{
		ssize_t		nread = read(fd, buffer + len, size - len);

		if (nread < 0 && errno == EINTR)
			continue;
		if (nread < 0)
		{
			int			save_errno = errno;

			explicit_bzero(buffer, size);
			errno = save_errno;
			ereport(ERROR,
					(errcode_for_file_access(),
					 errmsg("could not read %s: %m", what)));
		}
		if (nread == 0)
			break;
		len += nread;
	}
	CloseTransientFile(fd);

	if (len == size)
	{
		explicit_bzero(buffer, size);
		ereport(ERROR,
				(errcode(ERRCODE_CONFIG_FILE_ERROR),
				 errmsg("%s is larger than %zu bytes", what, size - 1)));
	}
	buffer[len] = '\0';
	if (strlen(buffer) != len)
	{
		explicit_bzero(buffer, size);
		ereport(ERROR,
				(errcode(ERRCODE_CONFIG_FILE_ERROR),
				 errmsg("%s has a zero byte in it", what)));
	}
}

/*
 * Read a file of secrets, one a line.
 *
 * Returns a list of C strings that is not empty.  Raises the same errors.
 */
List *
secret_file_read(const char *path)
{
	char		buffer[SECRET_FILE_MAX_BYTES + 1];
	char	   *what = psprintf("file \"%s\"", path);
	List	   *volatile secrets = NIL;

	secret_file_load(path, what, buffer, sizeof(buffer));
	PG_TRY();
	{
		secrets = split_lines(buffer, what);
	}
	PG_FINALLY();
	{
		explicit_bzero(buffer, sizeof(buffer));
	}
	PG_END_TRY();
	if (secrets == NIL)
		ereport(ERROR,
				(errcode(ERRCODE_CONFIG_FILE_ERROR),
				 errmsg("%s is empty", what)));

	return secrets;
}

/*
 * The secrets in an environment variable of the postmaster, one a line.
 * Returns NIL if it is not set or empty.
 */
List *
secret_environment_read(const char *variable)
{
	const char *value = getenv(variable);

	return value == NULL ? NIL :
		split_lines(value, psprintf("environment variable %s", variable));
}

/* check_hook of a setting that names such a file: an absolute path, or "" */
bool
secret_file_check_setting(char **newval, void **extra, GucSource source)
{
	if (**newval != '\0' && !is_absolute_path(*newval))
	{
		GUC_check_errdetail("It must be an absolute path.");
		return false;
	}
	return true;
}
