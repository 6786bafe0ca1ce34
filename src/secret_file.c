/*-------------------------------------------------------------------------
 *
 * secret_file.c
 *	  Files and environment variables that hold secrets.
 *
 * The value of a secret never is a setting: ALTER ROLE ... SET can be read by
 * every role, and the server logs what a reload changes.  So a setting names a
 * file, one secret a line, or the postmaster's environment holds the value.
 *
 * A file is read each time it is needed: it is small, and so a new secret counts
 * from the next call on, with no cache that could be out of date.  What makes
 * it fit to hold a secret is the rule that PostgreSQL has for the private key
 * of a server: a regular file of the server's user that nobody else can
 * access, or one of root's that the server's group may read.
 *
 * Errors name the setting and its file, never what stands in it.
 *
 * src/secret_file.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "storage/fd.h"

#include "errors.h"
#include "secret_file.h"

#define SECRET_FILE_MAX_BYTES (16 * 1024)

/*
 * What is wrong with a secret, as a fragment for an error's DETAIL that never
 * quotes it, or NULL.
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
			return gettext_noop("It has a character that isn't printable ASCII, or white space.");
	}
	return NULL;
}

/*
 * The secrets in a text, one a line; white space at a line's ends and empty lines
 * don't count.  A list of C strings, palloc'd.
 */
static List *
split_lines(const char *text, const char *source, const char *what)
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
					 errmsg("%s %s has a line that can't be a secret", what, source),
					 errdetail_internal("%s", _(secret_problem(start, end - start)))));
		secrets = lappend(secrets, pnstrdup(start, end - start));
	}

	return secrets;
}

/*
 * Read a file of secrets, one a line.
 *
 * "what" is the setting that names it, for messages.  Returns a list of C
 * strings, which isn't empty.  Raises ERRCODE_CONFIG_FILE_ERROR, or what
 * belongs to the errno, for a file that can't be read or mustn't be used.
 */
List *
secret_file_read(const char *path, const char *what)
{
	char		buffer[SECRET_FILE_MAX_BYTES + 1];
	struct stat st;
	ssize_t		nread = 0;
	List	   *secrets;
	int			fd;

	/* a FIFO mustn't block */
	fd = OpenTransientFile(path, O_RDONLY | O_NONBLOCK | PG_BINARY);
	if (fd < 0)
		ereport(ERROR,
				(errcode_for_file_access(),
				 errmsg("could not open file \"%s\": %m", path),
				 errdetail("It is named by %s.", what)));
	if (fstat(fd, &st) != 0)
		ereport(ERROR,
				(errcode_for_file_access(),
				 errmsg("could not stat file \"%s\": %m", path)));

	if (!S_ISREG(st.st_mode))
		ereport(ERROR,
				(errcode(ERRCODE_CONFIG_FILE_ERROR),
				 errmsg("%s \"%s\" is not a regular file", what, path)));
	if (st.st_uid != geteuid() && st.st_uid != 0)
		ereport(ERROR,
				(errcode(ERRCODE_CONFIG_FILE_ERROR),
				 errmsg("%s \"%s\" must be owned by the server's user or root", what, path)));
	if ((st.st_uid == geteuid() && (st.st_mode & (S_IRWXG | S_IRWXO)) != 0) ||
		(st.st_uid != geteuid() && (st.st_mode & (S_IWGRP | S_IXGRP | S_IRWXO)) != 0))
		ereport(ERROR,
				(errcode(ERRCODE_CONFIG_FILE_ERROR),
				 errmsg("%s \"%s\" can be accessed by others", what, path),
				 errdetail("It must have permissions 0600 or less if it belongs to the server's user, 0640 or less if to root."),
				 errhint("chmod 600, and consider the secret in it known.")));
	if (st.st_size > SECRET_FILE_MAX_BYTES)
		ereport(ERROR,
				(errcode(ERRCODE_CONFIG_FILE_ERROR),
				 errmsg("%s \"%s\" is larger than %d bytes", what, path, SECRET_FILE_MAX_BYTES)));

	while (nread < SECRET_FILE_MAX_BYTES)
	{
		ssize_t		n = read(fd, buffer + nread, SECRET_FILE_MAX_BYTES - nread);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			ereport(ERROR,
					(errcode_for_file_access(),
					 errmsg("could not read file \"%s\": %m", path)));
		if (n == 0)
			break;
		nread += n;
	}
	CloseTransientFile(fd);
	buffer[nread] = '\0';

	if (strlen(buffer) != nread)
		ereport(ERROR,
				(errcode(ERRCODE_CONFIG_FILE_ERROR),
				 errmsg("%s \"%s\" has a zero byte in it", what, path)));
	secrets = split_lines(buffer, psprintf("\"%s\"", path), what);
	explicit_bzero(buffer, sizeof(buffer));
	if (secrets == NIL)
		ereport(ERROR,
				(errcode(ERRCODE_CONFIG_FILE_ERROR),
				 errmsg("%s \"%s\" is empty", what, path)));

	return secrets;
}

/*
 * Secrets of an environment variable, as the postmaster was started with it:
 * one a line.  NIL where it isn't set or empty.
 */
List *
secret_environment_read(const char *variable, const char *what)
{
	const char *value = getenv(variable);

	return value == NULL ? NIL : split_lines(value, variable, what);
}

/* check_hook of a setting that names such a file: an absolute path, or nothing */
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
